"""Differences of two adapters by block of the base: how much they differ, and whether they point the same way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffgraft.adapters.ops.compare import Norms
from diffgraft.adapters.ops.health import block_name, block_order


@dataclass(frozen=True)
class BlockDifference:
    """Difference of two adapters in all modules of a block."""

    name: str
    """Name as in strengths (IN01, M00, OUT05), or the beginning of the modules' paths; ``all`` for all modules"""
    modules: int
    error: float
    """‖A − B‖ / ‖A‖ for the changes A and B of both adapters; infinite if only the second one changes the block"""
    cosine: float
    """Cosine of the angle between A and B, as vectors of all entries; NaN if one of them is zero"""
    ratio: float
    """‖B‖ / ‖A‖"""

    def line(self) -> str:
        """Return the figures as a row of the table below `HEAD`."""
        name = self.name if len(self.name) <= 24 else f"…{self.name[-23:]}"
        return (
            f"{name:24} {self.modules:7} {_number(self.error):>11} {_number(self.cosine):>8} {_number(self.ratio):>9}"
        )


HEAD = f"{'block':24} {'modules':>7} {'‖A−B‖/‖A‖':>11} {'cosine':>8} {'‖B‖/‖A‖':>9}"
"""Head of a table of blocks; A is what the first adapter adds to the weights, and B what the second adds"""


def block_differences(norms: Mapping[str, Norms]) -> list[BlockDifference]:
    """Return how much two adapters differ in each block, in the order of the base, and in all modules together.

    Args:
        norms: those of `AdapterComparison.norms`, by module path.
    """
    members: dict[str, list[Norms]] = {}
    for path, own in norms.items():
        members.setdefault(block_name(path), []).append(own)
    named = sorted(members.items(), key=lambda item: block_order(item[0]))
    blocks = [("all", [*norms.values()]), *named] if norms else []
    found = []
    for name, parts in blocks:
        total = Norms.total(parts)
        ratio = total.second / total.first if total.first > 0 else math.inf
        found.append(BlockDifference(name, len(parts), total.error, total.cosine, ratio))
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
