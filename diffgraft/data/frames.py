"""How pictures are scaled and cut: to squares, or to the nearest of several sizes (buckets)."""

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
    """One way to show a picture: scaled, then cut, then perhaps mirrored."""

    original: Size
    scaled: Size
    corner: tuple[int, int]
    """(left, top) of what is shown, in the scaled picture"""
    size: Size
    flipped: bool = False

    @property
    def area_fraction(self) -> float:
        """Share of the picture's area that is left."""
        return math.prod(self.size) / math.prod(self.scaled)

    def crop(self, image: Image.Image) -> Image.Image:
        """`image`, of the original size, in this frame; masks, in mode L, as well."""
        left, top = self.corner
        # the part of the original that is wanted, in its own pixels: scaling alone that is exact, and cheaper
        across, down = (own / new for own, new in zip(self.original, self.scaled, strict=True))
        box = (left * across, top * down, (left + self.size[0]) * across, (top + self.size[1]) * down)
        found = image.resize(self.size, Image.Resampling.LANCZOS, box)
        return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else found

    def size_conditioning(self) -> SizeConditioning:
        """What Stable Diffusion XL is told of it."""
        left, top = self.corner
        return SizeConditioning((self.original[1], self.original[0]), (top, left), (self.size[1], self.size[0]))


def bucket_sizes(side: int, settings: Buckets, step: int) -> tuple[Size, ...]:
    """All sizes of at most side² pixels, each as high as its width lets it be; sides are multiples of `step`.

    As NovelAI's buckets are made, and kohya's (`make_bucket_resolutions` of sd-scripts): for each width the largest
    height, and each of them turned.
    """
    least, most = _bounds(side, settings, step)
    found: set[Size] = {(_down(side, step), _down(side, step))}
    for width in range(least, most + 1, step):
        height = min(most, _down(side * side // width, step))
        if height >= least:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def frames(
    original: Size, side: int, settings: Buckets, step: int, cuts: int = 1, at_random: bool = False, seed: int = 0
) -> list[Frame]:
    """`cuts` ways to show a picture of a size: all from its middle, or at places drawn from `seed`.

    Args:
        original: the picture's size.
        side: resolution in pixels; squares have this side, buckets about as many pixels.
        settings: buckets, or none.
        step: what sides of latents' pictures must be multiples of.
        cuts: how many, where they are drawn at random; where nothing is cut off they are all the same, and one is left.
        at_random: whether to draw them.
        seed: the picture's own.
    """
    size = _fitting(original, side, settings, step)
    scale = max(wanted / own for wanted, own in zip(size, original, strict=True))
    scaled = tuple(max(wanted, round(own * scale)) for wanted, own in zip(size, original, strict=True))
    spare = [whole - cut for whole, cut in zip(scaled, size, strict=True)]
    middle = Frame(original, (scaled[0], scaled[1]), (spare[0] // 2, spare[1] // 2), size)
    if not at_random or not any(spare):
        return [middle]
    drawn = np.random.default_rng([seed, 11])
    corners = [(int(drawn.integers(spare[0] + 1)), int(drawn.integers(spare[1] + 1))) for _ in range(cuts)]
    return [replace(middle, corner=corner) for corner in dict.fromkeys(corners)]


def mirrored(given: Sequence[Frame]) -> list[Frame]:
    """Each, and each mirrored."""
    return [*given, *(replace(frame, flipped=True) for frame in given)]


def _fitting(original: Size, side: int, settings: Buckets, step: int) -> Size:
    if not settings.use:
        return side, side
    step = bucket_step(side, settings, step)
    if not settings.upscale and math.prod(original) <= side * side:
        least, most = _bounds(side, settings, step)
        own = (min(most, max(least, _down(edge, step))) for edge in original)
        return next(own), next(own)
    return _nearest(original, _sizes(side, settings.model_dump_json(), step))


@cache
def _sizes(side: int, settings: str, step: int) -> tuple[Size, ...]:
    return bucket_sizes(side, Buckets.model_validate_json(settings), step)


def _nearest(original: Size, sizes: Sequence[Size]) -> Size:
    """The size nearest in shape; of two that are as near, the larger."""
    shape = math.log(original[0] / original[1])
    return min(sizes, key=lambda size: (round(abs(shape - math.log(size[0] / size[1])), 9), -math.prod(size)))


def bucket_step(side: int, settings: Buckets, step: int) -> int:
    """Pixels between sizes: as set, else 64 or an eighth of the side, as a multiple of `step`.

    Raises:
        DiffgraftError: what is set is no multiple of `step`.
    """
    if settings.step is not None and settings.step % step:
        raise DiffgraftError(f"buckets.step={settings.step} is no multiple of {step}, which this base needs.")
    return settings.step or max(step, _down(min(64, side // 8), step))


def _bounds(side: int, settings: Buckets, step: int) -> tuple[int, int]:
    least, most = settings.min or side // 2, settings.max or side * 2
    if least > side or most < side:
        raise DiffgraftError(
            f"buckets.min={least} and buckets.max={most} leave out squares of the resolution, {side}: "
            "the one may not be above it, the other not below."
        )
    return -(-least // step) * step, _down(most, step)


def _down(number: int, step: int) -> int:
    return max(step, number // step * step)
