"""Near-duplicates: pictures that are copies of each other, in other sizes or compressions."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 9, 8
_MAX_BITS = 3
"""Number of the 64 hash bits in which near-duplicates may differ"""
_SIDE = 16
_MAX_DIFFERENCE = 3.0
"""Mean difference of brightness, 0 to 255, of near-duplicates; the hash alone says little about plain pictures"""


@dataclass(frozen=True)
class Fingerprint:
    """A small description of a picture for comparisons."""

    differences: int
    """64 bits: whether each coarse cell is brighter than the one to its left (difference hash, Krawetz 2013)"""
    cells: np.ndarray
    """Brightness of coarse cells, [16, 16]"""


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of a picture of any size."""
    grey = image.convert("L")
    values = np.asarray(grey.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX), dtype=np.int16)
    bits = "".join("1" if brighter else "0" for brighter in (values[:, 1:] > values[:, :-1]).flat)
    return Fingerprint(int(bits, 2), np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float32))


def near_duplicates(fingerprints: Iterable[tuple[str, Fingerprint]]) -> list[tuple[str, str]]:
    """Return the pairs of names whose fingerprints are nearly equal."""
    return [(a, b) for (a, first), (b, second) in combinations(fingerprints, 2) if _is_similar(first, second)]


def _is_similar(a: Fingerprint, b: Fingerprint) -> bool:
    if (a.differences ^ b.differences).bit_count() > _MAX_BITS:
        return False
    return float(np.abs(a.cells - b.cells).mean()) <= _MAX_DIFFERENCE
