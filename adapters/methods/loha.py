"""LoHa: the elementwise product of two low-rank matrices.

W' = W + (alpha / r) · (w1_a · w1_b) ∘ (w2_a · w2_b), of rank up to r² (FedPara, Hyeon-Woo et al. 2021,
arXiv:2108.06098, proposition 1; LyCORIS, Yeh et al. 2023, arXiv:2309.14859, section 3.2). For convolutions the input
channels and the kernel form one axis, or, in the Tucker variant (FedPara, proposition 3), each of the two products is a
small k × k core between 1 × 1 factors.
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
    add_product,
    attach_factors,
)
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, run_layer, weight_shape


def khatri_rao(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Return U [out, r²] and D [r², in · k · k] with U · D = (w1_a · w1_b) ∘ (w2_a · w2_b).

    U[o, (i, j)] = w1_a[o, i] · w2_a[o, j] and D[(i, j), n] = w1_b[i, n] · w2_b[j, n]: a product of sums is the sum of
    the products of all pairs. So LoHa of rank r is LoRA of rank r², with factors that are cheap to compute.
    """
    up = (leaves["hada_w1_a"].unsqueeze(2) * leaves["hada_w2_a"].unsqueeze(1)).flatten(1)
    down = (leaves["hada_w1_b"].unsqueeze(1) * leaves["hada_w2_b"].unsqueeze(0)).flatten(0, 1)
    return up, down


def _contract_core(leaves: Leaves) -> dict[str, Tensor]:
    """Convert a Tucker LoHa to a plain one, by contracting each core t [r, r, …] with its factor w_b [r, in]."""
    plain: dict[str, Tensor] = {}
    for side in (1, 2):
        core, out, inner = (leaves[f"hada_{name}"] for name in (f"t{side}", f"w{side}_a", f"w{side}_b"))
        plain[f"hada_w{side}_a"] = out.T
        plain[f"hada_w{side}_b"] = torch.einsum("rs...,si->ri...", core, inner).flatten(1)
    return plain


class HadamardProduct(Factors):
    """ΔW as the Hadamard product of two low-rank products.

    Leaves: hada_w1_a, hada_w2_a [out, r] and hada_w1_b, hada_w2_b [r, in · k · k]; in the Tucker variant hada_t1,
    hada_t2 [r, r, k, k], with _a [r, out] and _b [r, in].
    """

    kind = "loha"
    is_low_rank = True

    def __init__(self, tucker: bool = False) -> None:
        self._tucker = tucker

    def init_leaves(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Initialize as LyCORIS does: w1_b and w2_b with standard deviation 1, w1_a and t with 0.1, w2_a with zero."""

        def normal(std: float, *sides: int) -> Tensor:
            return torch.randn(*sides, generator=generator) * std

        out, width, kernel = shape[0], shape[1], shape[2:]
        if self._tucker and kernel != () and kernel != (1, 1):
            return {
                "hada_t1": normal(0.1, rank, rank, *kernel),
                "hada_w1_a": normal(0.1, rank, out),
                "hada_w1_b": normal(1, rank, width),
                "hada_t2": normal(0.1, rank, rank, *kernel),
                "hada_w2_a": torch.zeros(rank, out),
                "hada_w2_b": normal(1, rank, width),
            }
        inner = torch.Size(shape[1:]).numel()
        return {
            "hada_w1_a": normal(0.1, out, rank),
            "hada_w1_b": normal(1, rank, inner),
            "hada_w2_a": torch.zeros(out, rank),
            "hada_w2_b": normal(1, rank, inner),
        }

    def rank(self, leaves: Leaves) -> int:
        return leaves["hada_w1_b"].shape[0]

    def weight_shape(self, leaves: Leaves) -> Shape | None:
        if "hada_t1" not in leaves:
            return None
        return tuple(self.weight(leaves, (0, 0, *leaves["hada_t1"].shape[2:])).shape)

    def matrix_shape(self, leaves: Leaves) -> Shape:
        return self.weight_shape(leaves) or (leaves["hada_w1_a"].shape[0], leaves["hada_w1_b"].shape[1])

    def low_rank_factors(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        return khatri_rao(_contract_core(leaves) if "hada_t1" in leaves else leaves)

    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        if "hada_t1" in leaves:
            first, second = (
                torch.einsum("ij...,ip,jq->pq...", leaves[f"hada_t{n}"], leaves[f"hada_w{n}_a"], leaves[f"hada_w{n}_b"])
                for n in (1, 2)
            )
            return first * second
        first, second = (leaves[f"hada_w{n}_a"] @ leaves[f"hada_w{n}_b"] for n in (1, 2))
        return (first * second).view(shape)

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """Return ΔW · x without the scale and without the output of the layer itself.

        ΔW is applied as two factors of rank r² (a Khatri–Rao product) if that is cheaper than forming it.
        """
        if not self._is_thin(leaves, layer):
            return super().forward(leaves, layer, x)
        up, down = khatri_rao(leaves)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(run_layer(layer, x, down.view(-1, *weight_shape(layer)[1:])), up[..., None, None])
        return F.linear(F.linear(x, down), up)

    def add(self, out: Tensor, scale: float, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d) or not self._is_thin(leaves, layer):
            return super().add(out, scale, leaves, layer, x)
        up, down = khatri_rao(leaves)
        return add_product(out, scale, x, down, up)

    def _is_thin(self, leaves: Leaves, layer: nn.Module) -> bool:
        out, *rest = weight_shape(layer)
        inner, rank = math.prod(rest), self.rank(leaves)
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        return not grouped and "hada_t1" not in leaves and rank**2 * (out + inner) < out * inner


HADAMARD = HadamardProduct()


class LohaOptions(RankOptions):
    """Options of LoHa beside rank and alpha."""

    conv_rank: int | None = Field(None, ge=1)
    """Rank of convolutions with kernels larger than 1 × 1; unset: the same rank as other layers"""
    tucker: bool = False
    """Tucker decomposition: small k × k cores between 1 × 1 factors"""


def attach(target: Any, spec: Spec) -> Attached:
    options: LohaOptions = spec.options

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        conv = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        rank = (options.conv_rank or spec.rank) if conv else spec.rank
        size = options.size(path, rank, spec.alpha / spec.rank * rank)
        return FactorLayer(HadamardProduct(options.tucker), layer, *size, generator)

    return attach_factors(target, spec, make)


def _product_shape(leaves: Leaves, number: int) -> tuple[int, ...]:
    """Shape of the first or the second of the two products. Raises ValueError if its factors do not fit together."""
    a, b = leaves[f"hada_w{number}_a"].shape, leaves[f"hada_w{number}_b"].shape
    core = leaves.get(f"hada_t{number}")
    if core is None and a[1] == b[0]:
        return a[0], b[1]
    if core is not None and core.shape[:2] == (a[0], b[0]):
        return a[1], b[1], *core.shape[2:]
    raise ValueError(f"hada_w{number}_a is {list(a)} and hada_w{number}_b {list(b)}, which cannot be multiplied")


@with_optional_dora
def read(leaves: Leaves, alpha: float | None) -> FactorDelta:
    """Build LoHa from its leaves; without an alpha the scale is 1. Raises ValueError if leaves do not fit together."""
    plain = {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}
    if set(leaves) not in (plain, plain | {"hada_t1", "hada_t2"}):
        raise ValueError(f"{', '.join(sorted(leaves))} are not the factors of a LoHa")
    if any(leaf.ndim != 2 for name, leaf in leaves.items() if name in plain):
        raise ValueError("the factors of a LoHa must be matrices")
    first, second = _product_shape(leaves, 1), _product_shape(leaves, 2)
    if first != second:  # which the elementwise product would broadcast
        raise ValueError(f"the two products of a LoHa must have one shape, but are {list(first)} and {list(second)}")
    return FactorDelta(HADAMARD, leaves, HADAMARD.rank(leaves) if alpha is None else alpha)


METHOD = Method(
    name="loha",
    summary="the elementwise product of two low-rank matrices: rank up to r², in a file of twice the size",
    attach=attach,
    options=LohaOptions,
    layers="all",
    read=read,
)
