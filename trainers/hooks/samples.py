"""Images that a run generates: samples while it trains, and a before/after grid of base and adapter."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, ImageOps

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.data.conditions import condition_pictures
from diffgraft.data.frames import frames
from diffgraft.data.settings import Buckets
from diffgraft.generation.control import ControlInput
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid
from diffgraft.generation.sampling import OverflowedPictureError
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_image
from diffgraft.trainers.training_data.concepts import ConceptImages
from diffgraft.trainers.training_data.prompts import prompt_builders

_FIRST_SEED = 50_000
"""First seed of samples, far from those of class images, so that no sample equals an image seen in training"""
_MOST_CONDITIONS = 4
"""Number of condition pictures that samples of a control network are drawn with"""
Steered = Sequence[tuple[str, Image.Image]]
"""Prompts with their condition pictures"""


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


def steered_samples(read: ConceptImages, side: int) -> Steered:
    """Prompts of a few training images, and their condition pictures as squares; empty without a control network."""
    samples: list[tuple[str, Image.Image]] = []
    for concept, pictures in read:
        if concept.conditions is not None:
            few = pictures[: _MOST_CONDITIONS - len(samples)]
            for picture, condition in zip(few, condition_pictures(few, concept.conditions), strict=True):
                (square,) = frames(picture.size, side, Buckets.model_validate({}), side)
                prompt = prompt_builders(concept, picture)[0].prompts()[0]
                samples.append((prompt, to_image(condition.crop(square) * 2 - 1)))
    return samples


def draw_steered(samples: Steered, network: Adapter | None, base: Base, count: int = 4) -> dict[str, list[Image.Image]]:
    """Generate `count` images for each prompt, steered by its condition picture; without a network by nothing."""
    images = {}
    with Session(base) as session:
        for row, (prompt, condition) in enumerate(samples):
            if network is not None:
                session.steer(network, ControlInput(condition))
            settings, seeds = DrawSettings(size=condition.size), range(_FIRST_SEED, _FIRST_SEED + count)
            images[prompt + " " * row] = session.draw(prompt, seeds, settings)  # prompts may be equal
    return images


def before_after(
    prompts: Sequence[str],
    side: int,
    base: Base,
    adapter: Adapter,
    training_images: Sequence[Image.Image] = (),
    steered: Steered = (),
) -> Image.Image:
    """Grid of images of the base and of base with adapter, with equal seeds, under a row of `training_images`.

    With `steered`, its prompts take the place of `prompts`, and condition pictures stand before the images.
    """
    if steered:
        conditions = [[condition] for _, condition in steered]
        before, after = draw_steered(steered, None, base), draw_steered(steered, adapter, base)
    else:
        conditions, before = [[]] * len(prompts), draw_samples(prompts, side, base, "pictures of the base")
        with graft(base, {adapter: 1.0}):
            after = draw_samples(prompts, side, base, "pictures with the adapter")
    size = next(iter(before.values()))[0].size
    fitted = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in training_images]
    rows = {"training images": fitted} if fitted else {}
    words = "condition | before | after" if steered else "before | after"
    for own, (prompt, images) in zip(conditions, before.items(), strict=True):
        rows[f"{prompt}  ·  {words}"] = own + images + after[prompt]
    return grid(rows)
