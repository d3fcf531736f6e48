"""Predicting an adapter from pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.data.image_folder import read_folder
from diffgraft.errors import DiffgraftError, wrap_system_errors
from diffgraft.pixels import to_tensor
from diffgraft.predictor.files import SHIPPED, read_predictor

MOST = 5
"""Pictures that a predictor looks at; of a larger folder, the first ones"""
_SIDE = 64
"""Side of the pictures that a predictor looks at, in pixels"""


@wrap_system_errors
@torch.no_grad()
def predict_adapter(
    images: str | Path | Sequence[Image.Image], base: Base, predictor: str | Path | None = None
) -> Adapter:
    """Predict a LoRA for the subject in one to five pictures, in one pass of a small network.

    Pictures are cut to their middle square and scaled to 64 × 64 pixels. The LoRA acts on any rare word before a noun,
    such as "a sks dog". Its rank is that of the predictor.

    Args:
        images: folder of pictures, or pictures.
        base: base that the predictor was trained for.
        predictor: file of a predictor; None: that of the embedded base.

    Raises:
        DiffgraftError: there are no pictures, or the predictor is for another base.
    """
    pictures = [picture.image for picture in read_folder(images)] if isinstance(images, str | Path) else [*images]
    if not pictures:
        raise DiffgraftError("There are no pictures to predict an adapter from: give one to five of one subject.")
    model = read_predictor(Path(predictor) if predictor is not None else SHIPPED, base)
    views = to_tensor([_square(picture) for picture in pictures[:MOST]]).unsqueeze(0)
    family = base.family
    metadata = {
        "method": "lora",
        "rank": model.rank,
        "alpha": float(model.rank),
        "base": {"name": Path(base.name).name, "family": family.name, "hash": base.hash, **family.header(base)},
    }
    return model.adapter(model(views)[0], family.denoiser, metadata)


def _square(picture: Image.Image) -> Image.Image:
    """Return the middle square of a picture, RGB, scaled to the side that predictors look at."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    cut = picture.convert("RGB").crop((left, top, left + side, top + side))
    return cut.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
