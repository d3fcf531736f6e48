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
class Frame:
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
    def area_fraction(self) -> float:
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
    """Return all bucket sizes of at most side² pixels, with sides that are multiples of `step`, sorted.

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


def frames(
    original: Size, side: int, settings: Buckets, step: int, cuts: int = 1, at_random: bool = False, seed: int = 0
) -> list[Frame]:
    """Return the crops of a picture: one from its centre, or `cuts` random ones.

    Args:
        original: size of the picture.
        side: resolution in pixels: the side of squares; buckets have about side² pixels.
        settings: settings of buckets; they may be turned off.
        step: sides of crops are multiples of this number of pixels, as the VAE and the denoiser require.
        cuts: number of random crops; equal ones are returned once.
        at_random: whether crops are random.
        seed: seed of the random crops of this picture.
    """
    size = _target_size(original, side, settings, step)
    scale = max(target / length for target, length in zip(size, original, strict=True))
    scaled = tuple(max(target, round(length * scale)) for target, length in zip(size, original, strict=True))
    spare = [length - target for length, target in zip(scaled, size, strict=True)]
    middle = Frame(original, (scaled[0], scaled[1]), (spare[0] // 2, spare[1] // 2), size)
    if not at_random or not any(spare):
        return [middle]
    rng = np.random.default_rng([seed, 11])
    corners = [(int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))) for _ in range(cuts)]
    return [replace(middle, corner=corner) for corner in dict.fromkeys(corners)]


def with_mirrored(frames: Sequence[Frame]) -> list[Frame]:
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
