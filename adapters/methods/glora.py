"""GLoRA: low-rank matrices on the input of a layer and beside it (Chavan et al. 2023, arXiv:2306.07967).

Of the paper's five terms, LyCORIS implements the two that change the weight: W' = W + strength · s · (W · A + B), with
A = a1 · a2 on the inputs, B = b1 · b2, and s = alpha / rank. It is read, merged and converted, but not trained here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.projections import same_layer

_LEAVES = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True, repr=False)
class GloraDelta(Delta):
    """W' = W + strength · (alpha / r) · (W · a1 · a2 + b1 · b2)."""

    leaves: Mapping[str, Tensor]
    """``a1`` [in, r], ``a2`` [r, in], ``b1`` [out, r], ``b2`` [r, in, …kernel], optionally ``bm`` [r, r, …kernel]; in
    files from before May 2024 ``a1`` [r, in], ``a2`` [in, r], ``b1`` [r, in], ``b2`` [out, r]"""
    alpha: float

    kind = "glora"

    @property
    def has_old_order(self) -> bool:
        """Whether the first and the second factors are swapped, as in files from before May 2024.

        For a square layer both orders fit; then the rank is taken to be the smaller side.
        """
        a1, a2, b1, b2 = (self.leaves[name].shape for name in _LEAVES)
        old, new = a1[0] == a2[1] == b1[0] == b2[1], a1[1] == a2[0] == b1[1] == b2[0]
        return bool(old and (not new or a1[0] < a1[1]))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors a1, a2, b1, b2 in today's order."""
        a1, a2, b1, b2 = (self.leaves[name].float() for name in _LEAVES)
        return (a2, a1, b2, b1) if self.has_old_order else (a1, a2, b1, b2)

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        a1, a2, b1, b2 = (factor.to(weight.device) for factor in self._factors())
        input_change = a1.flatten(1) @ a2.flatten(1)
        if "bm" in self.leaves:
            b2 = torch.einsum("rs...,si->ri...", self.leaves["bm"].float().to(weight.device), b2.flatten(1))
        added = (b1.flatten(1) @ b2.flatten(1)).view(weight.shape)
        changed = torch.einsum("oj...,ji->oi...", weight, input_change)
        return weight + strength * self.alpha / a2.shape[0] * (changed + added), bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        if len(weight_shape) < 2:
            return False
        out, width, *_ = weight_shape
        a1, a2, b1, b2 = self._factors()
        kernel = self.leaves["bm"].shape[2:] if "bm" in self.leaves else b2.shape[2:]
        sizes = (a1.shape[0], a2.shape[1], b1.shape[0], b2.shape[1])
        return sizes == (width, width, out, width) and same_layer((out, width, *kernel), weight_shape)


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """Build GLoRA from its leaves; without an alpha the scale is 1. Raises ValueError if leaves do not fit together."""
    if not set(_LEAVES) <= set(leaves) or not set(leaves) <= {*_LEAVES, "bm"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the factors of GLoRA")
    if any(leaf.ndim < 2 for leaf in leaves.values()):
        raise ValueError("the factors of GLoRA must be matrices")
    delta = GloraDelta(dict(leaves), 1.0)
    a1, a2, b1, b2 = delta._factors()
    rank = a2.shape[0]
    if (a1.shape[1], b1.shape[1], b2.shape[0]) != (rank, rank, rank):
        shapes = f"a1 {list(a1.shape)}, a2 {list(a2.shape)}, b1 {list(b1.shape)}, b2 {list(b2.shape)}"
        raise ValueError(f"its factors have no common rank: {shapes}")
    return GloraDelta(dict(leaves), float(rank) if alpha is None else alpha)


KINDS = {"glora": read}
