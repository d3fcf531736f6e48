"""Captions for pictures, by any transformers model that generates text from images."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.data.hf_models import load_hf_model, process_state
from diffgraft.data.image_folder import read_folder
from diffgraft.data.inventory import kohya_folders
from diffgraft.data.pictures import Picture
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_text
from diffgraft.progress import track

DEFAULT = "Salesforce/blip-image-captioning-large"
"""Hub id of the default model, a BLIP with weights in safetensors"""
_PROMPTS = {"florence2": "<DETAILED_CAPTION>", "paligemma": "caption en"}
"""Type of a model → its own prompt for captions"""
_QUESTION = "Describe this picture in one sentence."
"""Prompt of chat models"""


class Captioner:
    """A model that writes a caption for a picture."""

    def __init__(self, model: str = DEFAULT, question: str = "", max_tokens: int = 60) -> None:
        """Load the model.

        Args:
            model: hub id or folder.
            question: prompt of a chat model, or beginning of the caption for other models; empty: the usual one.
            max_tokens: number of tokens of a caption at most.

        Raises:
            DiffgraftError: the model does not exist, or cannot caption pictures.
        """
        from transformers import AutoModelForImageTextToText

        self._model, self._processor = load_hf_model((AutoModelForImageTextToText,), model, "caption pictures")
        self._is_chat = bool(getattr(self._processor, "chat_template", None))
        self._question = question or (_QUESTION if self._is_chat else _PROMPTS.get(self._model.config.model_type, ""))
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> str:
        """Return the caption of an RGB picture on one line; decoding is greedy, so it is always the same.

        Raises:
            DiffgraftError: the model needs inputs that are not supported here.
        """
        try:
            inputs = self._inputs(image).to(self._model.device, self._model.dtype)
            ids = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)[0]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            kind = self._model.config.model_type
            raise DiffgraftError(
                f"Models of the type {kind!r} need inputs that are not supported here ({error}). Choose another with "
                "--model, or give the prompt that its authors use with --question."
            ) from error
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(ids[: prompt.shape[1]], prompt[0]):  # the output repeats the prompt
            ids = ids[prompt.shape[1] :]
        return " ".join(self._processor.decode(ids, skip_special_tokens=True).split())

    def _inputs(self, image: Image.Image) -> Any:
        if self._is_chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": self._question}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return self._processor.apply_chat_template([{"role": "user", "content": content}], **options)
        inputs = self._processor(
            images=image, **({"text": self._question} if self._question else {}), return_tensors="pt"
        )
        if "token_type_ids" not in inspect.signature(self._model.forward).parameters:
            inputs.pop("token_type_ids", None)
        if self._question and self._model.config.model_type == "git":  # without the end token it continues the text
            for key in ("input_ids", "attention_mask"):
                inputs[key] = inputs[key][:, :-1]
        return inputs


def caption_files(
    folder: str | Path, captioner: Captioner, prefix: str = "", *, overwrite: bool = False
) -> tuple[list[Path], int]:
    """Write a caption to `NAME.txt` beside each picture of a folder; each of several processes writes its share.

    Args:
        folder: folder of pictures, flat or in kohya's layout.
        captioner: model that writes the captions.
        prefix: text before each caption, separated by a space.
        overwrite: whether existing captions are replaced.

    Returns:
        Paths of the written files, and the number of existing captions that were kept.

    Raises:
        DiffgraftError: the folder does not exist, or has no pictures.
    """
    pictures = pictures_with_paths(folder)
    todo = [(path, picture) for path, picture in pictures if overwrite or not path.with_suffix(".txt").exists()]
    written = []
    for path, picture in process_share(todo, "captioning"):
        caption = f"{prefix} {captioner(picture.image)}".strip()
        written.append(write_text(path.with_suffix(".txt"), f"{caption}\n"))
    return written, len(pictures) - len(todo)


def pictures_with_paths(folder: str | Path) -> list[tuple[Path, Picture]]:
    """Return the path and the picture for each picture of a folder, which may have kohya's layout.

    Raises:
        DiffgraftError: the folder does not exist, or has no pictures.
    """
    folders = [subfolder.folder for subfolder in kohya_folders(folder)] or [Path(folder).expanduser()]
    return [(subfolder / picture.name, picture) for subfolder in folders for picture in read_folder(subfolder)]


def process_share(pictures: Sequence[tuple[Path, Picture]], title: str) -> Iterator[tuple[Path, Picture]]:
    """Yield the pictures that are this process's share, reported as a phase called `title`."""
    state = process_state()
    state.wait_for_everyone()  # all processes list the pictures before one writes files that change the list
    share = pictures[state.process_index :: state.num_processes]
    yield from track(share, title) if state.is_main_process else share
