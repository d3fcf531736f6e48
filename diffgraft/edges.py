"""Edges of pictures as lines on black, by Canny's method: condition pictures for control networks.

Canny 1986 ("A computational approach to edge detection", sections IV to VII): a Gaussian, the gradient, its local
maxima across the edge, and hysteresis with two thresholds.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOW, HIGH = 100.0, 200.0
"""Thresholds of the gradient by Sobel's 3 × 3 kernels, for grey values from 0 to 255; those usual for ControlNet"""
_GAUSSIAN = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
_GAUSSIAN /= _GAUSSIAN.sum()
_SMOOTH, _SLOPE = np.array([1.0, 2.0, 1.0]), np.array([-1.0, 0.0, 1.0])
_STEEP = np.tan(np.pi / 8)
"""Slope that separates directions along a side of the pixel from diagonal ones"""

Grid = NDArray[np.float64]


def edges(image: Image.Image, low: float = LOW, high: float = HIGH) -> Image.Image:
    """Return the edges of a picture as white lines, one pixel wide, on black: an RGB image of its size.

    Args:
        image: the picture.
        low: gradient from which a pixel continues a line.
        high: gradient from which a pixel begins one.
    """
    grey = _filtered(np.asarray(image.convert("L"), np.float64), _GAUSSIAN, _GAUSSIAN)
    across, down = _filtered(grey, _SMOOTH, _SLOPE), _filtered(grey, _SLOPE, _SMOOTH)
    gradient = np.hypot(across, down)
    ridges = np.where(_is_ridge(gradient, across, down), gradient, 0)
    lines = _grown(ridges >= high, ridges >= low)
    return Image.fromarray(lines.astype(np.uint8) * 255).convert("RGB")


def _filtered(values: Grid, rows: Grid, columns: Grid) -> Grid:
    """Correlate [h, w] with a kernel `rows` along its height and one along its width, with its borders repeated."""
    for axis, kernel in ((0, rows), (1, columns)):
        half = len(kernel) // 2
        padded = np.pad(values, [(half, half) if side == axis else (0, 0) for side in (0, 1)], "edge")
        size = values.shape[axis]
        values = sum(weight * padded.take(range(at, at + size), axis) for at, weight in enumerate(kernel))
    return values


def _is_ridge(gradient: Grid, across: Grid, down: Grid) -> NDArray[np.bool_]:
    """Whether each pixel has the largest gradient of the three that lie in its direction, [h, w]."""
    padded = np.pad(gradient, 1)
    height, width = gradient.shape

    def neighbour(right: int, below: int) -> Grid:
        return padded[1 + below : 1 + below + height, 1 + right : 1 + right + width]

    flat, steep = np.abs(down) <= _STEEP * np.abs(across), np.abs(across) <= _STEEP * np.abs(down)
    falling = across * down > 0
    is_ridge = np.zeros(gradient.shape, bool)
    for where, right, below in (
        (flat, 1, 0),
        (steep & ~flat, 0, 1),
        (~flat & ~steep & falling, 1, 1),
        (~flat & ~steep & ~falling, -1, 1),
    ):
        # of two equal neighbours one counts, so that lines are one pixel wide
        largest = (gradient > neighbour(-right, -below)) & (gradient >= neighbour(right, below))
        is_ridge |= where & largest
    return is_ridge


def _grown(strong: NDArray[np.bool_], weak: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of `weak` that are connected to one of `strong`, by sides or corners, [h, w]."""
    height, width = strong.shape
    count = -1
    while (found := int(strong.sum())) > count:
        count = found
        padded = np.pad(strong, 1)
        near = [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)]
        strong = np.logical_or.reduce(near) & weak
    return strong
