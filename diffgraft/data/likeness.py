"""Pictures that are nearly the same: copies, other sizes and other compressions of one picture."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 9, 8
_APART = 3
"""Of 64 differences, so many may be others"""


def fingerprint(image: Image.Image) -> int:
    """64 bits: whether each coarse cell is brighter than the one to its left (difference hash, Krawetz 2013)."""
    grey = image.convert("L").resize((_WIDTH, _HEIGHT), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    return int("".join("1" if brighter else "0" for brighter in (values[:, 1:] > values[:, :-1]).flat), 2)


def alike(named: Iterable[tuple[str, int]]) -> list[tuple[str, str]]:
    """Names of pairs whose fingerprints are nearly the same."""
    return [(a, b) for (a, one), (b, other) in combinations(named, 2) if (one ^ other).bit_count() <= _APART]
