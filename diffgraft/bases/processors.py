"""Processors of vision-language models, of which only the tokenizer is used: prompts here are texts."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diffgraft.bases.configs import LARGEST_JSON

_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files of a processor that a tokenizer does not write"""


def text_processor(tokenizer: Any, files: Mapping[str, bytes] | None = None) -> Any:
    """Return a processor of Qwen3-VL for texts alone, in the place of the class of transformers with this name.

    That one cannot be made without torchvision, which it needs for videos.

    Args:
        tokenizer: tokenizer of the processor.
        files: name → contents of the files for pictures and videos, which are only passed on.
    """
    return _text_processor_class()(tokenizer, dict(files or {}))


@cache
def _text_processor_class() -> type:
    """Return the class of processors for texts; importing transformers takes seconds."""
    from transformers import ProcessorMixin

    class Qwen3VLProcessor(ProcessorMixin):  # type: ignore[misc]
        """Tokenizer, and files for the rest."""

        def __init__(self, tokenizer: Any, files: dict[str, bytes]) -> None:
            self.tokenizer, self.files = tokenizer, files

        def __call__(self, text: Sequence[str], **options: Any) -> Any:
            return self.tokenizer(list(text), **options)

        def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
            return [self.tokenizer.apply_chat_template(conversation, **options)]

        def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
            self.tokenizer.save_pretrained(save_directory)
            for name, content in self.files.items():
                (Path(save_directory) / name).write_bytes(content)

        def __repr__(self) -> str:
            return f"{type(self).__name__}(tokenizer={self.tokenizer!r})"

    # diffusers writes to the index of a folder from where it would load a part
    Qwen3VLProcessor.__module__ = "transformers.models.qwen3_vl.processing_qwen3_vl"
    return Qwen3VLProcessor


def read_processor(folder: Path, tokenizer: Any) -> Any:
    """Return the processor in a folder, whose tokenizer is loaded already."""
    paths = [path for name in _FILES if (path := folder / name).is_file() and path.stat().st_size <= LARGEST_JSON]
    return text_processor(tokenizer, {path.name: path.read_bytes() for path in paths})


def tokenizer_in(parts: Any, name: str) -> Any:
    """Return the tokenizer called `name` of a pipeline, or that of its processor; None if it has neither."""
    own = getattr(parts, name, None)
    return own if own is not None or name != "tokenizer" else getattr(getattr(parts, "processor", None), name, None)
