"""The matrix of low rank that comes nearest to another (Eckart and Young 1936), by the way its shape asks for.

A product of thin factors is decomposed through their QR decompositions, never formed; a rank far below the sides is
found by a randomised range finder (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4); all else through
the eigenvectors of the smaller Gram matrix in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.errors import DiffgraftError

_SPARE, _ROUNDS = 8, 6
"""Ranks that the range finder takes in addition, and its rounds of power iteration"""
_FIRST = 32
"""Where a share is asked for, so many ranks are tried first: what fine-tuning changes is often of no more"""
_THIN = 8
"""Sides must be as many times a rank for the range finder to pay"""


@dataclass(frozen=True)
class RankBudget:
    """How large a reduced matrix may be: of a rank, or of the least rank that holds a share of the squared norm."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise DiffgraftError(f"Invalid value rank={self.rank}: must be 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise DiffgraftError(
                f"Invalid value energy={self.energy}: must be a share above 0 and at most 1, such as 0.95."
            )

    def take(self, squares: Tensor, total: float) -> int:
        """How many singular values to keep, from their squares in falling order and the sum of all of them."""
        if total <= 0:
            return 0
        floor = float(torch.finfo(torch.float32).eps) ** 2 * total
        kept = int((squares > floor).sum())
        if self.energy is not None and self.energy < 1:
            kept = min(kept, int((squares.cumsum(0) < self.energy * total).sum()) + 1)
        return kept if self.rank is None else min(kept, self.rank)


@dataclass(frozen=True)
class LowRankApproximation:
    """A low-rank matrix as up · down."""

    up: Tensor
    """[out, k]"""
    down: Tensor
    """[k, n]"""
    lost: float
    """‖difference‖ / ‖matrix‖"""

    def lora(self, shape: Shape) -> FactorDelta | None:
        """As LoRA for a weight of `shape`, None where nothing is left.

        Raises:
            DiffgraftError: its numbers are beyond float32.
        """
        rank = self.up.shape[1]
        if rank == 0:
            return None
        ones = [1] * (len(shape) - 2)
        up, down = self.up.float().cpu().contiguous(), self.down.float().cpu().contiguous()
        _total(torch.cat([up.flatten(), down.flatten()]).double().square())
        return low_rank(down.view(rank, *shape[1:]), up.view(-1, rank, *ones), float(rank))


def nearest(matrix: Tensor, size: RankBudget) -> LowRankApproximation:
    """The nearest matrix to one [out, n] of at most that size.

    Raises:
        DiffgraftError: it holds values that are no numbers.
    """
    total = _total(matrix.double().square())
    rank, share = size.rank or _FIRST, size.energy or 1.0
    if rank * _THIN < min(matrix.shape) and (size.rank is not None or share < 1):
        u, s, v = _range_finder(matrix.float(), rank + _SPARE)
        if size.rank is not None or float(s[:rank].double().square().sum()) > share * total:
            return _cut(u, s, v, total, size)
    u, s, v = _by_gram(matrix.double())
    return _cut(u, s, v, total, size)


def nearest_to_product(up: Tensor, down: Tensor, size: RankBudget) -> LowRankApproximation:
    """The nearest matrix to up [out, r] · down [r, n]; exact, as a sum of LoRAs whose factors stand side by side is.

    Raises:
        DiffgraftError: the factors hold values that are no numbers.
    """
    _total(torch.cat([up.double().square().flatten(), down.double().square().flatten()]))
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return nearest(up @ down, size)
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    return _cut(q_up @ u, s, q_down @ v.T, float(s.square().sum()), size)


def _total(squares: Tensor) -> float:
    """Their sum. Raises DiffgraftError where it is no number."""
    total = float(squares.sum())
    if not math.isfinite(total):
        raise DiffgraftError(
            "What an adapter adds to a layer is beyond the largest number of float32, so that nothing comes near it: "
            "the file is damaged, or its training diverged."
        )
    return total


def _cut(u: Tensor, s: Tensor, v: Tensor, total: float, size: RankBudget) -> LowRankApproximation:
    """The first singular triples: u [out, k], s [k], v [n, k]; their values shared between both factors."""
    kept = size.take(s.double().square(), total)
    root = s[:kept].clamp_min(0).sqrt()
    lost = max(0.0, total - float(s[:kept].double().square().sum()))
    share = (lost / total) ** 0.5 if total > 0 else 0.0
    return LowRankApproximation(u[:, :kept] * root, root[:, None] * v[:, :kept].T, share)


def _range_finder(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(matrix.device).manual_seed(0)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    basis = torch.randn(tall.shape[1], width, generator=generator, device=matrix.device)
    basis = torch.linalg.qr(tall @ basis).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u, v = basis @ u, vt.T
    return (u, s, v) if matrix.shape[0] >= matrix.shape[1] else (v, s, u)


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    s, u = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    v = (wide.T @ u) / s.clamp_min(torch.finfo(s.dtype).tiny)
    return (u, s, v) if matrix.shape[0] <= matrix.shape[1] else (v, s, u)
