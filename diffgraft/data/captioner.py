"""Captions for pictures, by any model of transformers that writes text about them."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.data.hf_models import load_hf_model, this_process
from diffgraft.data.image_folder import read_folder
from diffgraft.data.inventory import kohya_folders
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text
from diffgraft.progress import track

DEFAULT = "Salesforce/blip-image-captioning-large"
"""A model whose weights are in safetensors"""
_ASKED = {"florence2": "<DETAILED_CAPTION>", "paligemma": "caption en"}
"""Kinds of models that are told in their own way what to write"""
_QUESTION = "Describe this picture in one sentence."
"""What models that talk are asked"""


class Captioner:
    """A model that writes a caption for a picture."""

    def __init__(self, model: str = DEFAULT, question: str = "", max_tokens: int = 60) -> None:
        """Open it.

        Args:
            model: hub id or folder.
            question: put to a chat model; for other models, the beginning of the caption. Empty: the usual one of its
                kind.
            max_tokens: maximum number of tokens of a caption.

        Raises:
            DiffgraftError: there is no such model, or it cannot caption.
        """
        from transformers import AutoModelForImageTextToText

        self._model, self._processor = load_hf_model((AutoModelForImageTextToText,), model, "caption pictures")
        self._talks = bool(getattr(self._processor, "chat_template", None))
        self._ask = question or (_QUESTION if self._talks else _ASKED.get(self._model.config.model_type, ""))
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> str:
        """The caption of an RGB picture, on one line; always the same one.

        Raises:
            DiffgraftError: models of its kind are used in another way.
        """
        try:
            inputs = self._inputs(image).to(self._model.device, self._model.dtype)
            ids = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)[0]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            kind = self._model.config.model_type
            raise DiffgraftError(
                f"Models of the kind {kind!r} want to be asked in another way than is known here: {error}. Name "
                "another with --model, or --question as its authors do."
            ) from error
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(ids[: asked.shape[1]], asked[0]):  # the question comes along
            ids = ids[asked.shape[1] :]
        return " ".join(self._processor.decode(ids, skip_special_tokens=True).split())

    def _inputs(self, image: Image.Image) -> Any:
        if self._talks:
            content = [{"type": "image", "image": image}, {"type": "text", "text": self._ask}]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return self._processor.apply_chat_template([{"role": "user", "content": content}], **how)
        inputs = self._processor(images=image, **({"text": self._ask} if self._ask else {}), return_tensors="pt")
        if "token_type_ids" not in inspect.signature(self._model.forward).parameters:
            inputs.pop("token_type_ids", None)
        if self._ask and self._model.config.model_type == "git":  # it goes on with a text that has not ended
            for key in ("input_ids", "attention_mask"):
                inputs[key] = inputs[key][:, :-1]
        return inputs


def caption_files(
    folder: str | Path, captioner: Captioner, prefix: str = "", *, overwrite: bool = False
) -> tuple[list[Path], int]:
    """Write `NAME.txt` beside each picture of a folder; of several processes each takes its share of them.

    Args:
        folder: with pictures, or in kohya's layout.
        captioner: what writes them.
        prefix: put before each caption, with a space between.
        overwrite: whether captions that are there are written anew.

    Returns:
        What was written, and how many captions were there and kept.

    Raises:
        DiffgraftError: there is no such folder, or no picture in it.
    """
    found = pictures_with_paths(folder)
    wanted = [(path, picture) for path, picture in found if overwrite or not path.with_suffix(".txt").exists()]
    written = []
    for path, picture in shared(wanted, "captioning"):
        caption = f"{prefix} {captioner(picture.image)}".strip()
        written.append(write_text(path.with_suffix(".txt"), f"{caption}\n"))
    return written, len(found) - len(wanted)


def pictures_with_paths(folder: str | Path) -> list[tuple[Path, Picture]]:
    """The pictures of a folder, or of those of kohya's layout in it, and where they lie.

    Raises:
        DiffgraftError: there is no such folder, or no picture in it.
    """
    folders = [one.folder for one in kohya_folders(folder)] or [Path(folder).expanduser()]
    return [(where / picture.name, picture) for where in folders for picture in read_folder(where)]


def shared(wanted: Sequence[tuple[Path, Picture]], title: str) -> Iterator[tuple[Path, Picture]]:
    """Those that are this process's, reported as a phase called `title`."""
    state = this_process()
    state.wait_for_everyone()  # until all know what is wanted, which what is written changes
    mine = wanted[state.process_index :: state.num_processes]
    yield from track(mine, title) if state.is_main_process else mine
