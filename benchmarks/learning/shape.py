"""Shape score: how well the outline of a drawn subject agrees with the subject's own outline; colours do not count.

A picture on a plain background is reduced to a silhouette. The score is the intersection over union (Jaccard index) of
this silhouette and that of the subject's cut-out, at the best mirroring, rotation, scale and position of the cut-out.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

MARGIN = 2
"""Width in pixels of the frame around a picture whose median is taken as the colour of the background"""
CONTRAST = 0.15
"""Distance from the background, in RGB of 0..1, from which a pixel belongs to the subject"""
TILTS = range(-20, 21, 5)
"""Rotations of the cut-out that are tried, in degrees"""
SCALES = np.linspace(0.5, 0.95, 10)
"""Sides of the cut-out that are tried, as shares of the picture's side"""


def silhouette(picture: Image.Image) -> np.ndarray:
    """Return where a picture (RGB) on a plain background shows something else than its background, bool [h, w]."""
    pixels = np.asarray(picture.convert("RGB"), np.float64) / 255
    inner = np.zeros(pixels.shape[:2], bool)
    inner[MARGIN:-MARGIN, MARGIN:-MARGIN] = True
    background = np.median(pixels[~inner], axis=0)
    seen: np.ndarray = np.linalg.norm(pixels - background, axis=-1) > CONTRAST
    return seen


def shape_score(seen: np.ndarray, cutout: Image.Image) -> float:
    """Return the best intersection over union, 0 to 1, of a silhouette and a cut-out's outline.

    Args:
        seen: Silhouette, bool [h, w].
        cutout: Cut-out of the subject, RGBA; its opaque part is the outline.
    """
    height, width = seen.shape
    # products of transforms of twice the size give the overlap at every shift, without wrapping around
    transformed = np.fft.rfft2(seen, (2 * height, 2 * width))
    best = 0.0
    for outline in _placements(cutout, height, width):
        overlap = np.fft.irfft2(transformed * np.conj(np.fft.rfft2(outline, (2 * height, 2 * width))))
        together = round(float(overlap.max()))
        best = max(best, together / max(1, int(seen.sum()) + int(outline.sum()) - together))
    return best


def _placements(cutout: Image.Image, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the outline of the cut-out, bool [height, width], mirrored, rotated and scaled in all ways."""
    alpha = cutout.getchannel("A")
    for mirrored in (alpha, alpha.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        for tilt in TILTS:
            rotated = mirrored.rotate(tilt, Image.Resampling.BICUBIC)
            for scale in SCALES:
                side = round(float(scale) * max(height, width))
                canvas = Image.new("L", (width, height))
                canvas.paste(rotated.resize((side, side), Image.Resampling.BOX))
                yield np.asarray(canvas) > 127
