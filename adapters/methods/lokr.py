"""LoKr: a Kronecker product of a small matrix and a larger one that is itself low-rank.

W' = W + (alpha / r) · w1 ⊗ w2, with w1 [out_1, in_1], w2 [out_2, in_2, …kernel], out = out_1 · out_2 and
in = in_1 · in_2; w2 = w2_a · w2_b, or with a k × k kernel between them (Tucker). Where neither w1 nor w2 is split, the
scale is 1 (LyCORIS, Yeh et al. 2023, arXiv:2309.14859, section 3.3).
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.dora import with_optional_dora
from diffgraft.adapters.factors import (
    FactorDelta,
    FactorLayer,
    FactorOptions,
    Factors,
    Leaves,
    Shape,
    attach_factors,
    kaiming,
)
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, run_layer


class LokrOptions(FactorOptions):
    """What there is to set on LoKr."""

    factor: int = Field(-1, ge=-1)
    """Side of w1 (or of w2) where it divides the weight's, else the largest that w1 may have; -1: as near to the root
    of the weight's side as it divides"""
    decompose_both: bool = False
    """w1 low-rank as well (`decompose_both` in LyCORIS)"""
    full_matrix: bool = False
    """w2 whole, whatever the rank"""
    tucker: bool = False
    """A small k × k kernel between 1 × 1 factors of w2"""


def divided(side: int, factor: int) -> tuple[int, int]:
    """`side` as a product of two numbers, the smaller first, as LyCORIS divides it.

    One of them is `factor` where that divides; else the smaller is the largest divisor up to `factor` and to the root.
    """
    if factor > 0 and side % factor == 0:
        return min(factor, side // factor), max(factor, side // factor)
    top = math.isqrt(side) if factor < 1 else min(math.isqrt(side), factor)
    small = next(number for number in range(top, 0, -1) if side % number == 0)
    return small, side // small


class Kronecker(Factors):
    """The Kronecker product of w1 and w2.

    Leaves: lokr_w1 [out_1, in_1], or lokr_w1_a [out_1, r] and lokr_w1_b [r, in_1]; lokr_w2 [out_2, in_2, …kernel], or
    lokr_w2_a [out_2, r] and lokr_w2_b [r, in_2 · kernel], or (Tucker) lokr_t2 [r, r, …kernel], lokr_w2_a [r, out_2] and
    lokr_w2_b [r, in_2].
    """

    kind = "lokr"

    def __init__(self, options: LokrOptions | None = None) -> None:
        self._options = options or LokrOptions.model_validate({})

    def start(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """As LyCORIS does: the last factor of w2 is zero, all others start as PyTorch starts its layers."""
        options, kernel = self._options, shape[2:]
        (out_1, out_2), (in_1, in_2) = divided(shape[0], options.factor), divided(shape[1], options.factor)
        leaves: dict[str, Tensor] = {}
        if options.decompose_both and rank < max(out_1, in_1) / 2 and not options.full_matrix:
            leaves["lokr_w1_a"] = kaiming((out_1, rank), generator)
            leaves["lokr_w1_b"] = kaiming((rank, in_1), generator)
        else:
            leaves["lokr_w1"] = kaiming((out_1, in_1), generator)
        if rank >= max(out_2, in_2) / 2 or options.full_matrix:
            leaves["lokr_w2"] = torch.zeros(out_2, in_2, *kernel)
        elif options.tucker and any(side != 1 for side in kernel):
            leaves["lokr_t2"] = kaiming((rank, rank, *kernel), generator)
            leaves["lokr_w2_a"] = kaiming((rank, out_2), generator)
            leaves["lokr_w2_b"] = torch.zeros(rank, in_2)
        else:
            leaves["lokr_w2_a"] = kaiming((out_2, rank), generator)
            leaves["lokr_w2_b"] = torch.zeros(rank, in_2 * math.prod(kernel))
        return leaves

    def rank(self, leaves: Leaves) -> int:
        split = leaves.get("lokr_w2_b", leaves.get("lokr_w1_b"))
        return 1 if split is None else split.shape[0]

    def scale(self, leaves: Leaves, alpha: float) -> float:
        whole = "lokr_w1" in leaves and "lokr_w2" in leaves
        return 1.0 if whole else super().scale(leaves, alpha)

    def weight_shape(self, leaves: Leaves) -> Shape | None:
        if "lokr_t2" not in leaves:
            return None
        return tuple(self.weight(leaves, (0, 0, *leaves["lokr_t2"].shape[2:])).shape)

    def matrix_shape(self, leaves: Leaves) -> Shape:
        if (own := self.weight_shape(leaves)) is not None:
            return own
        (out_1, in_1), (out_2, in_2, *kernel) = (
            leaves[whole].shape if whole in leaves else (leaves[f"{whole}_a"].shape[0], leaves[f"{whole}_b"].shape[1])
            for whole in ("lokr_w1", "lokr_w2")
        )
        return (out_1 * out_2, in_1 * in_2, *kernel)

    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        one, two = self.pair(leaves, shape)
        return torch.kron(one.reshape(*one.shape, *[1] * len(shape[2:])), two)

    def pair(self, leaves: Leaves, shape: Shape) -> tuple[Tensor, Tensor]:
        """w1 [out_1, in_1] and w2 [out_2, in_2, …kernel] for a weight of `shape`."""
        one, kernel = self._one(leaves), shape[2:]
        if "lokr_w2" in leaves:
            two = leaves["lokr_w2"]
        elif "lokr_t2" in leaves:
            a, b = leaves["lokr_w2_a"], leaves["lokr_w2_b"]
            two = torch.einsum("ij...,ip,jq->pq...", leaves["lokr_t2"], a, b).contiguous()
        else:
            two = (leaves["lokr_w2_a"] @ leaves["lokr_w2_b"]).view(leaves["lokr_w2_a"].shape[0], -1, *kernel)
        return one, two

    def _one(self, leaves: Leaves) -> Tensor:
        """w1 [out_1, in_1]."""
        return leaves["lokr_w1"] if "lokr_w1" in leaves else leaves["lokr_w1_a"] @ leaves["lokr_w1_b"]

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """(w1 ⊗ w2) x, with x as [in_1, in_2]: w2 acts on the second axis, w1 on the first, and ⊗ is never formed.

        Where w2 is split, w1 comes between its factors, when that axis is r long: (1 ⊗ a) (w1 ⊗ 1) (1 ⊗ b).
        """
        if isinstance(layer, nn.Conv2d):
            return super().forward(leaves, layer, x) if layer.groups > 1 else self._convolution(leaves, layer, x)
        one = self._one(leaves)
        down = leaves["lokr_w2"] if "lokr_w2" in leaves else leaves["lokr_w2_b"]
        h = F.linear(x.reshape(*x.shape[:-1], one.shape[1], down.shape[1]), down)
        h = F.linear(h.transpose(-1, -2), one).transpose(-1, -2)
        return (h if "lokr_w2" in leaves else F.linear(h, leaves["lokr_w2_a"])).flatten(-2)

    def _convolution(self, leaves: Leaves, layer: nn.Conv2d, x: Tensor) -> Tensor:
        one, n = self._one(leaves), x.shape[0]
        h = x.reshape(n * one.shape[1], -1, *x.shape[2:])
        up: Tensor | None = None
        if "lokr_t2" in leaves:
            up = leaves["lokr_w2_a"].t()
            h = run_layer(layer, F.conv2d(h, leaves["lokr_w2_b"][..., None, None]), leaves["lokr_t2"])
        elif "lokr_w2" in leaves:
            h = run_layer(layer, h, leaves["lokr_w2"])
        else:
            up = leaves["lokr_w2_a"]
            h = run_layer(layer, h, leaves["lokr_w2_b"].view(-1, h.shape[1], *layer.kernel_size))
        size = h.shape[1:]
        h = (one @ h.reshape(n, one.shape[1], -1)).view(n, one.shape[0], size[0], -1)
        return (h if up is None else up @ h).view(n, -1, *size[1:])


KRONECKER = Kronecker()


def attach(target: Any, spec: Spec) -> Attached:
    options: LokrOptions = spec.options
    factors = Kronecker(options)

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        return FactorLayer(factors, layer, *options.size(path, spec.rank, spec.alpha), generator)

    return attach_factors(target, spec, make)


@with_optional_dora
def read(leaves: Leaves, alpha: float | None) -> FactorDelta:
    """LoKr from its leaves; without an alpha the scale is 1."""
    ones, twos = {"lokr_w1"}, {"lokr_w2"}
    split_one, split_two = {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}
    tucker = split_two | {"lokr_t2"}
    if set(leaves) not in [one | two for one in (ones, split_one) for two in (twos, split_two, tucker)]:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the factors of a LoKr")
    if any(leaf.ndim < 2 or (leaf.ndim > 2 and name not in ("lokr_w2", "lokr_t2")) for name, leaf in leaves.items()):
        raise ValueError("the factors of a LoKr are matrices, and these are not")
    return FactorDelta(KRONECKER, leaves, KRONECKER.rank(leaves) if alpha is None else alpha)


METHOD = Method(
    name="lokr",
    summary="a Kronecker product of a small and a larger matrix: all layers in a file as small as LoRA's",
    attach=attach,
    options=LokrOptions,
    layers="all",
    read=read,
)
