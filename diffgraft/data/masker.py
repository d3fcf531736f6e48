"""Masks of what a prompt names: by CLIPSeg, which takes any text, or by segmentation models with fixed labels."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffgraft.data.captioner import pictures_with_paths, process_share
from diffgraft.data.hf_models import load_hf_model
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.files import atomic_write

DEFAULT = "CIDAS/clipseg-rd64-refined"
"""Hub id of the default model, CLIPSeg (Lüddecke and Ecker 2021, arXiv:2112.10003)"""
Masker = Callable[[Image.Image], Image.Image]
"""Function of an RGB picture → mask in mode L and the picture's size: white where it shows what was asked for"""


def open_masker(prompt: str, model: str = DEFAULT, threshold: float = 0.3) -> Masker:
    """Load a model that makes masks of what a prompt names.

    Args:
        prompt: what to mask; for models with fixed labels, a text that contains labels.
        model: hub id or folder of a CLIPSeg or segmentation model.
        threshold: minimum probability of the mask, 0 to 1, for CLIPSeg.

    Raises:
        DiffgraftError: the model does not exist, cannot segment pictures, or has no label for the prompt.
    """
    from transformers import (
        AutoModelForImageSegmentation,
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
        CLIPSegForImageSegmentation,
    )

    if not prompt.strip():
        raise DiffgraftError('The prompt is empty: give what to mask, such as --prompt "the dog".')
    with_labels = (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation)
    segmenter, processor = load_hf_model((CLIPSegForImageSegmentation, *with_labels), model, "segment pictures")
    if isinstance(segmenter, CLIPSegForImageSegmentation):
        return _clipseg_masker(segmenter, processor, prompt, threshold)
    return _label_masker(segmenter, processor, prompt)


def _clipseg_masker(model: Any, processor: Any, prompt: str, threshold: float) -> Masker:
    @torch.inference_mode()
    def mask(image: Image.Image) -> Image.Image:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs).logits.float()  # [1, h, w], or [h, w], of the model's own size
        resized = torch.nn.functional.interpolate(
            logits[(None,) * (4 - logits.ndim)], image.size[::-1], mode="bilinear"
        )
        return _to_image(resized[0, 0].sigmoid() > threshold)

    return mask


def _label_masker(model: Any, processor: Any, prompt: str) -> Masker:
    from transformers import pipeline

    labels = sorted(set(model.config.id2label.values()))
    matching = {label for label in labels if any(_contains(prompt, word) for word in re.split(r"[,;]", label))}
    if not matching:
        raise DiffgraftError(f"This model has no label for {prompt!r}: {did_you_mean(prompt, labels)}")
    segment = pipeline("image-segmentation", model=model, image_processor=processor)

    def mask(image: Image.Image) -> Image.Image:
        masks = [np.asarray(part["mask"]) > 0 for part in segment(image) if part["label"] in matching]
        return _to_image(torch.from_numpy(np.any([np.zeros(image.size[::-1], bool), *masks], axis=0)))

    return mask


def _contains(prompt: str, word: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE))


def _to_image(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)


def mask_files(folder: str | Path, masker: Masker, grow: int = 0, *, overwrite: bool = False) -> tuple[list[Path], int]:
    """Write a mask to `NAME_mask.png` beside each picture of a folder; each of several processes writes its share.

    Pictures in which nothing is found get no mask, but a warning.

    Args:
        folder: folder of pictures, flat or in kohya's layout.
        masker: function that makes the masks.
        grow: number of pixels by which masks are enlarged on all sides.
        overwrite: whether existing masks are replaced.

    Returns:
        Paths of the written files, and the number of existing masks that were kept.

    Raises:
        DiffgraftError: the folder does not exist, or has no pictures.
    """
    pictures = [(path.with_name(f"{path.stem}_mask.png"), picture) for path, picture in pictures_with_paths(folder)]
    todo = [(path, picture) for path, picture in pictures if overwrite or picture.mask_file is None]
    written = []
    for path, picture in process_share(todo, "masking"):
        mask = masker(picture.image)
        if mask.getextrema() == (0, 0):
            warnings.warn(f"{picture.name} gets no mask: nothing was found in it.", stacklevel=2)
            continue
        with atomic_write(path) as partial:
            (mask.filter(ImageFilter.MaxFilter(2 * grow + 1)) if grow else mask).save(partial)
        written.append(path)
    return written, len(pictures) - len(todo)
