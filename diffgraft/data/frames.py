"""Scaling and cropping of pictures: to squares, or to aspect-ratio buckets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from diffgraft.bases.family import SizeConditioning
from diffgraft.data.settings import Buckets
from diffgraft.errors import DiffgraftError

Size = tuple[int, int]
"""(width, height) in pixels"""


@dataclass(frozen=True)
class Crop:
    """A crop of a picture: scaled, then cropped, then perhaps mirrored."""

    original: Size
    """Size of the picture"""
    scaled: Size
    """Size of the picture after scaling"""
    corner: tuple[int, int]
    """(left, top) of the crop in the scaled picture"""
    size: Size
    """Size of the crop"""
    flipped: bool = False
    """Whether the crop is mirrored"""

    @property
    def fraction_of_picture(self) -> float:
        """Share of the picture's area that the crop shows, above 0 and at most 1."""
        return math.prod(self.size) / math.prod(self.scaled)

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the crop of an image of size `original`; masks in mode L work as well."""
        left, top = self.corner
        # the crop in pixels of the original: scaling only that is exact, and cheaper
        across, down = (own / new for own, new in zip(self.original, self.scaled, strict=True))
        box = (left * across, top * down, (left + self.size[0]) * across, (top + self.size[1]) * down)
        cropped = image.resize(self.size, Image.Resampling.LANCZOS, box)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else cropped

    def size_conditioning(self) -> SizeConditioning:
        """Return the sizes and crop for the micro-conditioning of Stable Diffusion XL."""
        left, top = self.corner
        return SizeConditioning((self.original[1], self.original[0]), (top, left), (self.size[1], self.size[0]))


def bucket_sizes(side: int, settings: Buckets, step: int) -> tuple[Size, ...]:
    """Return all bucket sizes (width, height) of at most side² pixels, sorted.

    Sides are multiples of `step`, and within the limits of `settings`.

    The sizes are those of NovelAI's and kohya's buckets (`make_bucket_resolutions` of sd-scripts): for each width the
    largest height, and the same with width and height swapped.
    """
    least, most = _bounds(side, settings, step)
    sizes: set[Size] = {(_down(side, step), _down(side, step))}
    for width in range(least, most + 1, step):
        height = min(most, _down(side * side // width, step))
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class RandomCrops:
    """Random crops of a picture."""

    count: int
    """Number of crops; equal ones are used once"""
    scale: float = 1.0
    """Side of the smallest crop as a share of that of the largest one; scales are uniform between it and 1"""
    seed: int = 0
    """Seed of the crops of this picture"""


def frames(
    original: Size, side: int, settings: Buckets, step: int, random_crops: RandomCrops | None = None
) -> list[Crop]:
    """Return the crops of a picture: the largest one from its centre, or random ones.

    Args:
        original: size of the picture.
        side: resolution in pixels: the side of squares; buckets have about side² pixels.
        settings: settings of buckets; they may be turned off.
        step: sides of crops are multiples of this number of pixels, as the VAE and the denoiser require.
        random_crops: random crops to use instead of the one from the centre.
    """
    size = _target_size(original, side, settings, step)
    middle = _scaled_to_fill(original, size)
    if random_crops is None or (middle.scaled == size and random_crops.scale == 1):
        return [middle]
    rng = np.random.default_rng([random_crops.seed, 11])
    crops = []
    for _ in range(random_crops.count):
        # without zoom, no random number is drawn for it, so that crops stay those of cached latents
        zoom = 1 / rng.uniform(random_crops.scale, 1) if random_crops.scale < 1 else 1.0
        frame = _scaled_to_fill(original, size, zoom)
        left, top = (int(rng.integers(length - kept + 1)) for length, kept in zip(frame.scaled, size, strict=True))
        crops.append(replace(frame, corner=(left, top)))
    return list(dict.fromkeys(crops))


def _scaled_to_fill(original: Size, size: Size, zoom: float = 1.0) -> Crop:
    """Return the frame of `size` at the centre of the picture, which is scaled to fill it, times `zoom`."""
    scale = zoom * max(target / length for target, length in zip(size, original, strict=True))
    width, height = (max(target, round(length * scale)) for target, length in zip(size, original, strict=True))
    return Crop(original, (width, height), ((width - size[0]) // 2, (height - size[1]) // 2), size)


def with_mirrored(frames: Sequence[Crop]) -> list[Crop]:
    """Return the given frames, followed by a mirrored copy of each."""
    return [*frames, *(replace(frame, flipped=True) for frame in frames)]


def _target_size(original: Size, side: int, settings: Buckets, step: int) -> Size:
    if not settings.use:
        return side, side
    step = bucket_step(side, settings, step)
    if not settings.upscale and math.prod(original) <= side * side:
        least, most = _bounds(side, settings, step)
        width, height = (min(most, max(least, _down(edge, step))) for edge in original)
        return width, height
    return _nearest(original, _sizes(side, settings.model_dump_json(), step))


@cache
def _sizes(side: int, settings: str, step: int) -> tuple[Size, ...]:
    return bucket_sizes(side, Buckets.model_validate_json(settings), step)


def _nearest(original: Size, sizes: Sequence[Size]) -> Size:
    """Return the size of the nearest aspect ratio; of two equally near, the larger."""
    shape = math.log(original[0] / original[1])
    return min(sizes, key=lambda size: (round(abs(shape - math.log(size[0] / size[1])), 9), -math.prod(size)))


def bucket_step(side: int, settings: Buckets, step: int) -> int:
    """Return the step in pixels between bucket sizes: `buckets.step`, else 64 or an eighth of `side` if that is less.

    Raises:
        DiffgraftError: `buckets.step` is not a multiple of `step`.
    """
    if settings.step is not None and settings.step % step:
        raise DiffgraftError(f"Invalid value buckets.step={settings.step}: must be a multiple of {step} for this base.")
    return settings.step or max(step, _down(min(64, side // 8), step))


def _bounds(side: int, settings: Buckets, step: int) -> tuple[int, int]:
    least, most = settings.min or side // 2, settings.max or side * 2
    if least > side or most < side:
        raise DiffgraftError(
            f"buckets.min={least} and buckets.max={most} exclude squares of the resolution, {side}: "
            "buckets.min must be at most the resolution, and buckets.max at least."
        )
    return -(-least // step) * step, _down(most, step)


def _down(number: int, step: int) -> int:
    return max(step, number // step * step)
