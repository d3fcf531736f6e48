"""Pictures that a run draws: samples on the way, and the same without and with what was learnt."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, ImageOps

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.generation.generate import OverflowedPictureError, Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid

_SEEDS = 50_000
"""Samples count their seeds from here, so that none is a class image that training has seen."""


@contextmanager
def told_of_overflow(lacking: str) -> Iterator[None]:
    """Within the block a picture whose numbers overflow is warned of: training is worth more than its samples."""
    try:
        yield
    except OverflowedPictureError as error:
        warnings.warn(f"{lacking} {error}", stacklevel=4)


def draw(prompts: Sequence[str], side: int, base: Base, title: str, count: int = 4) -> dict[str, list[Image.Image]]:
    """`count` pictures of `side` pixels for each of `prompts`, with the same seeds every time."""
    listed = [prompt for prompt in prompts for _ in range(count)]
    seeds = [_SEEDS + number for _ in prompts for number in range(count)]
    images = generate(base.pipeline(), listed, Settings(size=(side, side)), seeds, title)
    return {prompt: images[row * count : (row + 1) * count] for row, prompt in enumerate(prompts)}


def before_after(
    prompts: Sequence[str], side: int, base: Base, adapter: Adapter, learnt: Sequence[Image.Image] = ()
) -> Image.Image:
    """A grid of both, the same seeds beside one another, under a row of pictures that were learnt from."""
    before = draw(prompts, side, base, "pictures before")
    with graft(base, {adapter: 1.0}):
        after = draw(prompts, side, base, "pictures after")
    size = next(iter(before.values()))[0].size
    shown = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in learnt]
    rows = {"learnt from": shown} if shown else {}
    return grid(rows | {f"{prompt}  ·  before | after": images + after[prompt] for prompt, images in before.items()})
