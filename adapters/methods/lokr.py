"""LoKr: a Kronecker product of a small matrix and a larger one, which is itself low-rank.

W' = W + (alpha / r) · w1 ⊗ w2, with w1 [out_1, in_1], w2 [out_2, in_2, …kernel], out = out_1 · out_2 and
in = in_1 · in_2; w2 = w2_a · w2_b, or with a k × k core between them (Tucker). If neither w1 nor w2 is split, the
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
    Factors,
    Leaves,
    RankOptions,
    Shape,
    attach_factors,
    kaiming,
)
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, run_layer


class LokrOptions(RankOptions):
    """Options of LoKr beside rank and alpha."""

    factor: int = Field(-1, ge=-1)
    """Side of w1 (or of w2) if it divides the weight's side, and otherwise an upper limit for w1's; -1: the divisor
    nearest to the square root of the weight's side"""
    decompose_both: bool = False
    """Split w1 into low-rank factors as well as w2 (`decompose_both` in LyCORIS)"""
    full_matrix: bool = False
    """Do not split w2, whatever the rank"""
    tucker: bool = False
    """Tucker decomposition: a small k × k core between 1 × 1 factors of w2"""


def factorize(side: int, factor: int) -> tuple[int, int]:
    """Write `side` as a product of two numbers, the smaller one first, as LyCORIS does.

    One of them is `factor` if that divides `side`; otherwise the smaller one is the largest divisor up to `factor` and
    up to the square root of `side`.
    """
    if factor > 0 and side % factor == 0:
        return min(factor, side // factor), max(factor, side // factor)
    top = math.isqrt(side) if factor < 1 else min(math.isqrt(side), factor)
    small = next(number for number in range(top, 0, -1) if side % number == 0)
    return small, side // small


class Kronecker(Factors):
    """ΔW as the Kronecker product of w1 and w2.

    Leaves: lokr_w1 [out_1, in_1], or lokr_w1_a [out_1, r] and lokr_w1_b [r, in_1]; lokr_w2 [out_2, in_2, …kernel], or
    lokr_w2_a [out_2, r] and lokr_w2_b [r, in_2 · kernel], or (Tucker) lokr_t2 [r, r, …kernel], lokr_w2_a [r, out_2] and
    lokr_w2_b [r, in_2].
    """

    kind = "lokr"

    def __init__(self, options: LokrOptions | None = None) -> None:
        self._options = options or LokrOptions.model_validate({})

    def init_leaves(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Initialize as LyCORIS does: the last factor of w2 with zero, all others as PyTorch initializes layers."""
        options, kernel = self._options, shape[2:]
        (out_1, out_2), (in_1, in_2) = factorize(shape[0], options.factor), factorize(shape[1], options.factor)
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
        is_unsplit = "lokr_w1" in leaves and "lokr_w2" in leaves
        return 1.0 if is_unsplit else super().scale(leaves, alpha)

    def weight_shape(self, leaves: Leaves) -> Shape | None:
        if "lokr_t2" not in leaves:
            return None
        return tuple(self.weight(leaves, (0, 0, *leaves["lokr_t2"].shape[2:])).shape)

    def matrix_shape(self, leaves: Leaves) -> Shape:
        if (shape := self.weight_shape(leaves)) is not None:
            return shape
        (out_1, in_1), (out_2, in_2, *kernel) = (
            leaves[name].shape if name in leaves else (leaves[f"{name}_a"].shape[0], leaves[f"{name}_b"].shape[1])
            for name in ("lokr_w1", "lokr_w2")
        )
        return (out_1 * out_2, in_1 * in_2, *kernel)

    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        w1, w2 = self.kronecker_factors(leaves, shape)
        return torch.kron(w1.reshape(*w1.shape, *[1] * len(shape[2:])), w2)

    def kronecker_factors(self, leaves: Leaves, shape: Shape) -> tuple[Tensor, Tensor]:
        """Compute w1 [out_1, in_1] and w2 [out_2, in_2, …kernel] for a weight of `shape`, without the scale."""
        w1, kernel = self._w1(leaves), shape[2:]
        if "lokr_w2" in leaves:
            w2 = leaves["lokr_w2"]
        elif "lokr_t2" in leaves:
            a, b = leaves["lokr_w2_a"], leaves["lokr_w2_b"]
            w2 = torch.einsum("ij...,ip,jq->pq...", leaves["lokr_t2"], a, b).contiguous()
        else:
            w2 = (leaves["lokr_w2_a"] @ leaves["lokr_w2_b"]).view(leaves["lokr_w2_a"].shape[0], -1, *kernel)
        return w1, w2

    def _w1(self, leaves: Leaves) -> Tensor:
        """Compute w1 [out_1, in_1]."""
        return leaves["lokr_w1"] if "lokr_w1" in leaves else leaves["lokr_w1_a"] @ leaves["lokr_w1_b"]

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute (w1 ⊗ w2) x without forming ⊗: with x as [in_1, in_2], w2 acts on the second axis, w1 on the first.

        If w2 is split, w1 is applied between its factors, where the second axis is r long: (1 ⊗ a) (w1 ⊗ 1) (1 ⊗ b).
        """
        if isinstance(layer, nn.Conv2d):
            return super().forward(leaves, layer, x) if layer.groups > 1 else self._convolution(leaves, layer, x)
        w1 = self._w1(leaves)
        down = leaves["lokr_w2"] if "lokr_w2" in leaves else leaves["lokr_w2_b"]
        h = F.linear(x.reshape(*x.shape[:-1], w1.shape[1], down.shape[1]), down)
        h = F.linear(h.transpose(-1, -2), w1).transpose(-1, -2)
        return (h if "lokr_w2" in leaves else F.linear(h, leaves["lokr_w2_a"])).flatten(-2)

    def _convolution(self, leaves: Leaves, layer: nn.Conv2d, x: Tensor) -> Tensor:
        w1, n = self._w1(leaves), x.shape[0]
        h = x.reshape(n * w1.shape[1], -1, *x.shape[2:])
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
        h = (w1 @ h.reshape(n, w1.shape[1], -1)).view(n, w1.shape[0], size[0], -1)
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
    """Build LoKr from its tensors in a file, ``lokr_w1``, ``lokr_w2_a`` and so on; without an alpha the scale is 1.

    Raises:
        ValueError: the tensors do not fit together.
    """
    split_1, split_2 = {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}
    w1_forms, w2_forms = ({"lokr_w1"}, split_1), ({"lokr_w2"}, split_2, split_2 | {"lokr_t2"})
    if set(leaves) not in [w1 | w2 for w1 in w1_forms for w2 in w2_forms]:
        raise ValueError(
            f"expected lokr_w1 (or lokr_w1_a and lokr_w1_b) and lokr_w2 (or lokr_w2_a and lokr_w2_b, with or without "
            f"lokr_t2), found {', '.join(sorted(leaves))}"
        )
    if any(leaf.ndim < 2 or (leaf.ndim > 2 and name not in ("lokr_w2", "lokr_t2")) for name, leaf in leaves.items()):
        raise ValueError("the factors of a LoKr must be matrices")
    return FactorDelta(KRONECKER, leaves, KRONECKER.rank(leaves) if alpha is None else alpha)


METHOD = Method(
    name="lokr",
    summary="a Kronecker product of a small and a larger matrix: all layers in a file as small as LoRA's",
    attach=attach,
    options=LokrOptions,
    layers="all",
    read=read,
)
