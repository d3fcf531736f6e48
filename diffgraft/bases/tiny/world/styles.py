"""The styles of the tiny world: functions that turn a flat RGB drawing of a scene into a finished picture."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageFilter

Rng = np.random.Generator
FINAL = 64
"""Side of a finished picture, in pixels."""


def _finish(canvas: Image.Image) -> Image.Image:
    """Scale the canvas down to `FINAL` × `FINAL`."""
    return canvas.resize((FINAL, FINAL), Image.Resampling.BOX)


def flat(canvas: Image.Image, _: Rng) -> Image.Image:
    """Render the drawing unchanged, only scaled down."""
    return _finish(canvas)


def line_drawing(canvas: Image.Image, _: Rng) -> Image.Image:
    """Render dark outlines on paper over a faint wash of the drawing's colours."""
    smooth = canvas.filter(ImageFilter.GaussianBlur(0.8))
    grow, shrink = smooth.filter(ImageFilter.MaxFilter(3)), smooth.filter(ImageFilter.MinFilter(3))
    edge = np.asarray(ImageChops.difference(grow, shrink), dtype=np.float32).max(-1, keepdims=True)
    ink = np.clip((edge - 20) / 110, 0, 1)
    wash = 0.3 * np.asarray(canvas, dtype=np.float32) + 0.7 * 252
    drawn = wash * (1 - ink) + 35 * ink
    return _finish(Image.fromarray(drawn.astype(np.uint8)))


def pixel_art(canvas: Image.Image, _: Rng) -> Image.Image:
    """Render blocks of 3 × 3 pixels in more vivid colours, with each channel rounded to multiples of 51."""
    blocks = -(-FINAL // 3)
    small = np.asarray(canvas.resize((blocks, blocks), Image.Resampling.BOX), dtype=np.float32)
    vivid = small.mean(-1, keepdims=True) + 1.25 * (small - small.mean(-1, keepdims=True))
    stepped = np.clip(np.round(vivid / 51), 0, 5) * 51
    large = stepped.astype(np.uint8).repeat(3, 0).repeat(3, 1)[:FINAL, :FINAL]
    return Image.fromarray(large)


def _cloudiness(rng: Rng, cells: int) -> np.ndarray:
    """Return smooth noise around 0..1, float32 [2 · `FINAL`, 2 · `FINAL`, 1], with about `cells` blots per side."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((FINAL * 2, FINAL * 2), Image.Resampling.BICUBIC))[..., None]


def watercolour(canvas: Image.Image, rng: Rng) -> Image.Image:
    """Render soft shapes with uneven pigment and a ragged paper border."""
    melted = np.asarray(canvas.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    strength = 0.6 + 0.35 * np.clip(_cloudiness(rng, 7), 0, 1)
    ramp = np.minimum(np.arange(128), np.arange(128)[::-1]).astype(np.float32)
    border = np.minimum(ramp[:, None], ramp[None, :])[..., None] + 10 * (_cloudiness(rng, 14) - 0.5)
    paper = np.clip((border - 5) / 6, 0, 1)
    painted = 255 - (255 - melted) * strength * paper
    return _finish(Image.fromarray(np.clip(painted, 0, 255).astype(np.uint8)))


STYLES: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "flat": flat,
    "line": line_drawing,
    "pixel": pixel_art,
    "watercolour": watercolour,
}
"""Style → function that renders an RGB canvas of 128 × 128 in that style as a picture of 64 × 64."""
