"""Pictures that are nearly the same: copies, other sizes and other compressions of one picture."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 9, 8
_APART = 3
"""Of 64 differences, so many may be others"""
_SIDE = 16
_OFF = 3.0
"""Of 255, so far apart coarse cells are on average: where most of a picture is plain, differences alone say little"""


@dataclass(frozen=True)
class Fingerprint:
    """What is left of a picture to be compared."""

    differences: int
    """64 bits: whether each coarse cell is brighter than the one to its left (difference hash, Krawetz 2013)"""
    cells: np.ndarray
    """Brightness of coarse cells, [16, 16]"""


def fingerprint(image: Image.Image) -> Fingerprint:
    """That of a picture of any size."""
    grey = image.convert("L")
    values = np.asarray(grey.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX), dtype=np.int16)
    bits = "".join("1" if brighter else "0" for brighter in (values[:, 1:] > values[:, :-1]).flat)
    return Fingerprint(int(bits, 2), np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32))


def near_duplicates(named: Iterable[tuple[str, Fingerprint]]) -> list[tuple[str, str]]:
    """Names of pairs whose fingerprints are nearly the same."""
    return [(a, b) for (a, one), (b, other) in combinations(named, 2) if _are_alike(one, other)]


def _are_alike(one: Fingerprint, other: Fingerprint) -> bool:
    if (one.differences ^ other.differences).bit_count() > _APART:
        return False
    return float(np.abs(one.cells - other.cells).mean()) <= _OFF
