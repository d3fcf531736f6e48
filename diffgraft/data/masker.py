"""Masks of what a prompt names: by CLIPSeg, which takes any words, or by models that know things by their labels."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffgraft.data.captioner import pictures_with_paths, shared
from diffgraft.data.hf_models import load_hf_model
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.files import atomic_write

DEFAULT = "CIDAS/clipseg-rd64-refined"
"""CLIPSeg (Lüddecke and Ecker 2021, arXiv:2112.10003)"""
Masker = Callable[[Image.Image], Image.Image]
"""An RGB picture → white where it shows what is looked for, black elsewhere; in mode L and the picture's size."""


def open_masker(prompt: str, model: str = DEFAULT, threshold: float = 0.3) -> Masker:
    """A model that finds what a prompt names.

    Args:
        prompt: what to look for; for models that know things by labels, words with such a label in them.
        model: hub id or folder, of a CLIPSeg or of a model for segmentation.
        threshold: how sure CLIPSeg has to be, from 0 to 1.

    Raises:
        DiffgraftError: there is no such model, it finds nothing in pictures, or does not know what is named.
    """
    from transformers import (
        AutoModelForImageSegmentation,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
        CLIPSegForImageSegmentation,
    )

    if not prompt.strip():
        raise DiffgraftError('Say what to look for: --prompt "the dog".')
    labelled = (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation)
    found, processor = load_hf_model((CLIPSegForImageSegmentation, *labelled), model, "find things in pictures")
    if isinstance(found, CLIPSegForImageSegmentation):
        return _by_words(found, processor, prompt, threshold)
    return _by_label(found, processor, prompt)


def _by_words(model: Any, processor: Any, prompt: str, threshold: float) -> Masker:
    @torch.inference_mode()
    def mask(image: Image.Image) -> Image.Image:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs).logits.float()  # [1, h, w], or [h, w], of the model's own size
        sure = torch.nn.functional.interpolate(logits[(None,) * (4 - logits.ndim)], image.size[::-1], mode="bilinear")
        return _picture(sure[0, 0].sigmoid() > threshold)

    return mask


def _by_label(model: Any, processor: Any, prompt: str) -> Masker:
    from transformers import pipeline

    labels = sorted(set(model.config.id2label.values()))
    named = {label for label in labels if any(_in(word, prompt) for word in re.split(r"[,;]", label))}
    if not named:
        raise DiffgraftError(f"This model has no label for {prompt!r}: {did_you_mean(prompt, labels)}")
    find = pipeline("image-segmentation", model=model, image_processor=processor)

    def mask(image: Image.Image) -> Image.Image:
        seen = [np.asarray(part["mask"]) > 0 for part in find(image) if part["label"] in named]
        return _picture(torch.from_numpy(np.any([np.zeros(image.size[::-1], bool), *seen], axis=0)))

    return mask


def _in(word: str, prompt: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE))


def _picture(where: torch.Tensor) -> Image.Image:
    return Image.fromarray(where.cpu().numpy().astype(np.uint8) * 255)


def mask_files(folder: str | Path, masker: Masker, grow: int = 0, *, overwrite: bool = False) -> tuple[list[Path], int]:
    """Write `NAME_mask.png` beside each picture of a folder; of several processes each takes its share of them.

    Where nothing is found no mask is written, and a warning says so.

    Args:
        folder: with pictures, or in kohya's layout.
        masker: what makes them.
        grow: pixels by which masks are made larger on all sides.
        overwrite: whether masks that are there are made anew.

    Returns:
        What was written, and how many masks were there and kept.

    Raises:
        DiffgraftError: there is no such folder, or no picture in it.
    """
    found = [(path.with_name(f"{path.stem}_mask.png"), picture) for path, picture in pictures_with_paths(folder)]
    wanted = [(path, picture) for path, picture in found if overwrite or picture.mask_file is None]
    written = []
    for path, picture in shared(wanted, "masking"):
        mask = masker(picture.image)
        if mask.getextrema() == (0, 0):
            warnings.warn(f"{picture.name} gets no mask: nothing was found in it.", stacklevel=2)
            continue
        with atomic_write(path) as partial:
            (mask.filter(ImageFilter.MaxFilter(2 * grow + 1)) if grow else mask).save(partial)
        written.append(path)
    return written, len(found) - len(wanted)
