"""Health of an adapter: how much it changes each block, how much of its rank it uses, and which rank would do."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.ops.effect import shapes_of
from diffgraft.adapters.ops.singular_values import effective_rank, squared_singular_values
from diffgraft.adapters.strengths import BLOCKS, block_of
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track

KEPT = 0.99
"""Share of the squared norm of all changes that the suggested rank keeps"""
_SATURATED = 0.9
"""Share of its rank that a saturated module uses, by its effective rank"""
_FAINT = 1e-3
"""Norm, as a share of the median norm, below which a module does next to nothing"""
_NUMBERED = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class ModuleHealth:
    """Figures of what an adapter adds to one module."""

    path: str
    norm: float
    """Frobenius norm ‖ΔW‖"""
    relative: float | None
    """‖ΔW‖ / ‖W‖; None if no base is named"""
    rank: int
    """Largest rank that ΔW can have"""
    effective_rank: float
    """exp of the entropy of the squared singular values, as shares of their sum (Roy and Vetterli 2007)"""

    @property
    def is_saturated(self) -> bool:
        """Whether it uses its whole rank about evenly, so that a larger one might hold more."""
        return self.rank > 1 and self.effective_rank > _SATURATED * self.rank


@dataclass(frozen=True)
class BlockHealth:
    """Health figures of all modules of a block together."""

    name: str
    """Name as in strengths (IN01, M00, OUT05), or the beginning of the modules' paths"""
    modules: int
    norm: float
    """Frobenius norm of all changes together"""
    relative: float | None
    """That norm / the norm of the weights together; None if no base is named"""
    effective_rank: float
    """Median of the modules' effective ranks"""


@dataclass(frozen=True)
class HealthReport:
    """Health of an adapter: norms, effective ranks, dead and saturated modules."""

    modules: Sequence[ModuleHealth]
    blocks: Sequence[BlockHealth]
    unknown: Sequence[str]
    """Paths of modules whose change depends on the weights of a base that is not named"""
    largest_rank: int
    """Largest rank of its modules"""
    suggested_rank: int
    """Smallest rank of all modules that keeps 0.99 of the squared norm of all changes; 0 if there is no change"""

    @property
    def dead(self) -> list[str]:
        """Paths of modules that do nothing, or next to nothing beside the others."""
        norms = [module.norm for module in self.modules if module.norm > 0]
        least = _FAINT * statistics.median(norms) if norms else 0.0
        return [module.path for module in self.modules if module.norm <= least]

    @property
    def saturated(self) -> list[str]:
        """Paths of modules that use their whole rank."""
        return [module.path for module in self.modules if module.is_saturated]

    def as_json(self) -> dict[str, Any]:
        """The health report as JSON types."""
        return {**asdict(self), "dead": self.dead, "saturated": self.saturated}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        out = ["block                    modules   ‖ΔW‖  ‖ΔW‖/‖W‖  effective rank"]
        for block in self.blocks:
            relative = "–" if block.relative is None else f"{block.relative:.2%}".replace("%", " %")
            name = block.name if len(block.name) <= 24 else f"…{block.name[-23:]}"
            out.append(f"{name:24} {block.modules:7} {block.norm:6.3g} {relative:>10} {block.effective_rank:15.1f}")
        out += _counted("dead", self.dead, "do nothing, or next to nothing beside the others")
        out += _counted("saturated", self.saturated, "use their whole rank: a larger rank might hold more")
        out += _counted("unknown", self.unknown, "depend on the weights of the base: name it with --base")
        if 0 < self.suggested_rank < self.largest_rank:
            out.append(
                f"rank {self.suggested_rank} of {self.largest_rank} keeps 99 % of the change: "
                f"diffgraft resize FILE NEW --rank {self.suggested_rank}"
            )
        return out


def _counted(title: str, paths: Sequence[str], meaning: str) -> list[str]:
    return [f"{title}: {len(paths)} modules {meaning} (e.g. {paths[0]})"] if paths else []


def health(adapter: Adapter, weights: Weights | None = None, device: str = "cpu") -> HealthReport:
    """Compute the health of an adapter.

    Args:
        adapter: an adapter with deltas.
        weights: weights of its base, from `diffgraft.bases.weights.open_weights`: with them, norms are also told
            relative to the weights, and methods that depend on the weights are measured.
        device: device that computes.

    Raises:
        DiffgraftError: the adapter changes no weights, or does not fit the base.
    """
    if not adapter.deltas:
        raise DiffgraftError("The adapter changes no weights of layers, so that there is no health to report.")
    modules, squares, totals, unknown = [], [], [], []
    known = {path: deltas for path, deltas in adapter.deltas.items() if weights is not None or _is_linear(deltas)}
    unknown = [path for path in adapter.deltas if path not in known]
    shapes = shapes_of(Adapter(known, adapter.metadata), weights) if known else {}
    for path, deltas in track(known.items(), "modules", min_items=20):
        shape, steps = shapes[path], [(delta, 1.0) for delta in deltas]
        own = squared_singular_values(path, steps, shape, weights, device).sort(descending=True).values.cpu()
        whole = None if weights is None else float(weights[f"{path}.weight"].float().norm())
        norm = float(own.sum().clamp_min(0).sqrt())
        relative = None if whole is None else norm / whole if whole > 0 else math.inf
        modules.append(ModuleHealth(path, norm, relative, _rank(deltas, shape), effective_rank(own)))
        squares.append(own)
        totals.append(whole)
    return HealthReport(
        modules,
        _blocks(modules, totals),
        unknown,
        max((module.rank for module in modules), default=0),
        rank_that_keeps(squares, KEPT),
    )


def rank_that_keeps(squares: Sequence[Tensor], share: float) -> int:
    """Return the smallest rank of all modules that keeps a share of the squared norm of all changes together.

    Args:
        squares: squared singular values of each module, largest first.
        share: the share, 0 to 1.
    """
    longest = max(map(len, squares), default=0)
    by_rank = torch.zeros(longest, dtype=torch.float64)
    for own in squares:
        by_rank[: len(own)] += own.double()
    total = by_rank.sum()
    if not total > 0:
        return 0
    kept = by_rank.cumsum(0) / total
    return int((kept < share - 1e-12).sum()) + 1


def _blocks(modules: Sequence[ModuleHealth], totals: Sequence[float | None]) -> list[BlockHealth]:
    """Return the figures of each block: those with a name in strengths in the order of the base, then the others."""
    members: dict[str, list[int]] = {}
    for place, module in enumerate(modules):
        members.setdefault(block_name(module.path), []).append(place)
    blocks = []
    for name, places in sorted(members.items(), key=lambda item: block_order(item[0])):
        norm = math.hypot(*(modules[place].norm for place in places))
        known = [total for place in places if (total := totals[place]) is not None]
        whole = math.hypot(*known) if known else 0.0
        ranks = statistics.median(modules[place].effective_rank for place in places)
        blocks.append(BlockHealth(name, len(places), norm, norm / whole if whole else None, ranks))
    return blocks


def block_order(name: str) -> int:
    """Return the place of a block in the base, by its `block_name`; those without a name in strengths come last."""
    return BLOCKS.index(name) if name in BLOCKS else len(BLOCKS)


def block_name(path: str) -> str:
    """Return the name of a module's block, or the beginning of its path up to the first number."""
    name = block_of(path)
    numbered = _NUMBERED.match(path)
    return name if name != "BASE" or numbered is None else numbered[1]


def _is_linear(deltas: Sequence[Delta]) -> bool:
    return all(isinstance(delta, LinearDelta) for delta in deltas)


def _rank(deltas: Sequence[Delta], shape: Shape) -> int:
    """Return the largest rank that the change of a module can have."""
    full = min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 1
    inner = [_inner(delta) for delta in deltas]
    return full if None in inner else min(full, sum(rank for rank in inner if rank is not None))


def _inner(delta: Delta) -> int | None:
    """Return the inner dimension of a delta's factors; None if they do not limit the rank."""
    factors: object = None if isinstance(delta, DoraDelta) else delta  # its rows are scaled beside the matrix
    return factors.rank if isinstance(factors, FactorDelta) and factors.is_lora else None
