"""Images that a run generates: samples while it trains, and a before/after grid of base and adapter."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, ImageOps

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid
from diffgraft.generation.sampling import OverflowedPictureError
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings

_FIRST_SEED = 50_000
"""First seed of samples, far from those of class images, so that no sample equals an image seen in training"""


@contextmanager
def warn_of_overflow(consequence: str) -> Iterator[None]:
    """Turn an overflow while generating into a warning that begins with `consequence`, so that training continues."""
    try:
        yield
    except OverflowedPictureError as error:
        warnings.warn(f"{consequence} {error}", stacklevel=4)


def draw_samples(
    prompts: Sequence[str], side: int, base: Base, title: str, count: int = 4
) -> dict[str, list[Image.Image]]:
    """Generate `count` square images of `side` pixels for each of `prompts`, with the same seeds in every call."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    seeds = [_FIRST_SEED + number for _ in prompts for number in range(count)]
    images = Session(base).draw_each(repeated, seeds, DrawSettings(size=(side, side)), phase_title=title)
    return {prompt: images[row * count : (row + 1) * count] for row, prompt in enumerate(prompts)}


def before_after(
    prompts: Sequence[str], side: int, base: Base, adapter: Adapter, training_images: Sequence[Image.Image] = ()
) -> Image.Image:
    """Grid of images of the base and of base with adapter, with equal seeds, under a row of `training_images`."""
    before = draw_samples(prompts, side, base, "pictures before")
    with graft(base, {adapter: 1.0}):
        after = draw_samples(prompts, side, base, "pictures after")
    size = next(iter(before.values()))[0].size
    fitted = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in training_images]
    rows = {"training images": fitted} if fitted else {}
    return grid(rows | {f"{prompt}  ·  before | after": images + after[prompt] for prompt, images in before.items()})
