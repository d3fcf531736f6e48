"""Best low-rank approximation of a matrix (Eckart and Young 1936), with an algorithm that suits its shape.

A product of thin factors is decomposed through their QR decompositions, and never formed. A rank far below the sides is
found by a randomised range finder (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), everything else
through the eigenvectors of the smaller Gram matrix in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.errors import DiffgraftError

_OVERSAMPLING, _POWER_ITERATIONS = 8, 6
"""Ranks that the range finder computes in addition, and its rounds of power iteration"""
_FIRST_RANK = 32
"""Rank tried first if a share of the energy is asked for: changes by fine-tuning often have no higher rank"""
_MIN_RATIO = 8
"""The range finder is used if both sides of the matrix are more than this many times the rank"""


@dataclass(frozen=True)
class RankBudget:
    """Size of a low-rank approximation: a rank, or the least rank that holds a share of the squared norm."""

    rank: int | None = None
    """Maximum rank; None: no limit"""
    energy: float | None = None
    """Share of the squared norm to keep, above 0 and at most 1; None: all of it"""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise DiffgraftError(f"Invalid value rank={self.rank}: must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise DiffgraftError(f"Invalid value energy={self.energy}: must be above 0 and at most 1, such as 0.95.")

    def rank_for(self, squares: Tensor, total: float) -> int:
        """Number of singular values to keep, given their squares in descending order and the sum of all squares."""
        if total <= 0:
            return 0
        floor = float(torch.finfo(torch.float32).eps) ** 2 * total
        rank = int((squares > floor).sum())
        if self.energy is not None and self.energy < 1:
            rank = min(rank, int((squares.cumsum(0) < self.energy * total).sum()) + 1)
        return rank if self.rank is None else min(rank, self.rank)


@dataclass(frozen=True)
class LowRankApproximation:
    """A low-rank matrix, as the product up · down."""

    up: Tensor
    """Left factor [out, k]"""
    down: Tensor
    """Right factor [k, n]"""
    relative_error: float
    """‖difference‖ / ‖matrix‖"""

    def lora(self, shape: Shape) -> FactorDelta | None:
        """Convert the approximation to a LoRA for a weight of `shape`; None if its rank is 0.

        Raises:
            DiffgraftError: a value is beyond the range of float32.
        """
        rank = self.up.shape[1]
        if rank == 0:
            return None
        ones = [1] * (len(shape) - 2)
        up, down = self.up.float().cpu().contiguous(), self.down.float().cpu().contiguous()
        _finite_sum(torch.cat([up.flatten(), down.flatten()]).double().square())
        return low_rank(down.view(rank, *shape[1:]), up.view(-1, rank, *ones), float(rank))


def approximate(matrix: Tensor, budget: RankBudget) -> LowRankApproximation:
    """Approximate a matrix [out, n] within `budget`.

    Raises:
        DiffgraftError: the matrix holds NaN or infinite values.
    """
    total = _finite_sum(matrix.double().square())
    rank, share = budget.rank or _FIRST_RANK, budget.energy or 1.0
    if rank * _MIN_RATIO < min(matrix.shape) and (budget.rank is not None or share < 1):
        u, s, v = _range_finder(matrix.float(), rank + _OVERSAMPLING)
        if budget.rank is not None or float(s[:rank].double().square().sum()) > share * total:
            return _truncate(u, s, v, total, budget)
    u, s, v = _svd_by_gram(matrix.double())
    return _truncate(u, s, v, total, budget)


def approximate_product(up: Tensor, down: Tensor, budget: RankBudget) -> LowRankApproximation:
    """Approximate the product up [out, r] · down [r, n] within `budget`; a budget of all energy gives it exactly.

    Raises:
        DiffgraftError: the factors hold NaN or infinite values.
    """
    _finite_sum(torch.cat([up.double().square().flatten(), down.double().square().flatten()]))
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return approximate(up @ down, budget)
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    return _truncate(q_up @ u, s, q_down @ v.T, float(s.square().sum()), budget)


def _finite_sum(squares: Tensor) -> float:
    """Sum of `squares`. Raises DiffgraftError if it is NaN or infinite."""
    total = float(squares.sum())
    if not math.isfinite(total):
        raise DiffgraftError(
            "What an adapter adds to a layer exceeds the range of float32, so it cannot be approximated: the file is "
            "damaged, or its training diverged."
        )
    return total


def _truncate(u: Tensor, s: Tensor, v: Tensor, total: float, budget: RankBudget) -> LowRankApproximation:
    """Keep the first singular triples, u [out, k], s [k], v [n, k], with √s in each of the two factors."""
    kept = budget.rank_for(s.double().square(), total)
    root = s[:kept].clamp_min(0).sqrt()
    lost = max(0.0, total - float(s[:kept].double().square().sum()))
    error = (lost / total) ** 0.5 if total > 0 else 0.0
    return LowRankApproximation(u[:, :kept] * root, root[:, None] * v[:, :kept].T, error)


def _range_finder(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `width` singular triples u, s, v of a matrix [out, n], approximately, by a randomised range finder."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    basis = torch.randn(tall.shape[1], width, generator=generator, device=matrix.device)
    basis = torch.linalg.qr(tall @ basis).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u, v = basis @ u, vt.T
    return (u, s, v) if matrix.shape[0] >= matrix.shape[1] else (v, s, u)


def _svd_by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triples u, s, v of a matrix [out, n], from the eigenvectors of its smaller Gram matrix."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    s, u = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    v = (wide.T @ u) / s.clamp_min(torch.finfo(s.dtype).tiny)
    return (u, s, v) if matrix.shape[0] <= matrix.shape[1] else (v, s, u)
