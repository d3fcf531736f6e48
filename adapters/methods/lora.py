"""LoRA: a low-rank matrix added to the weight (Hu et al. 2021, arXiv:2106.09685).

W' = W + (alpha / r) · up · down, with down [r, in] and up [out, r]; equation (3) and section 4.1 of the paper.
With `options.dora` the sum is brought to a learnt length per output (see `dora.py`); with `options.rslora` the scale is
alpha / √r (Kalajdzievski 2023, arXiv:2312.03732).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.dora import DoraLayer, with_optional_dora
from diffgraft.adapters.factors import (
    FactorDelta,
    FactorLayer,
    FactorOptions,
    Factors,
    Leaves,
    Shape,
    attach_factors,
    kaiming,
    plus_product,
)
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, run_layer


class LowRank(Factors):
    """The product of two thin matrices.

    Leaves: lora_down [r, in, …kernel], lora_up [out, r, …ones]; in the Tucker variant lora_down [r, in, 1, 1],
    lora_mid [r, r, …kernel].
    """

    kind = "lora"
    is_lora = is_low_rank = True

    def __init__(self, tucker: bool = False) -> None:
        self._tucker = tucker

    def start(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`down` as PyTorch starts its layers, `up` zero, as in the reference code of the paper."""
        out, width, *kernel = shape
        ones = [1] * len(kernel)
        leaves = {"lora_up": torch.zeros(out, rank, *ones)}
        if self._tucker and kernel and kernel != ones:
            leaves["lora_down"] = kaiming((rank, width, *ones), generator)
            leaves["lora_mid"] = kaiming((rank, rank, *kernel), generator)
        else:
            leaves["lora_down"] = kaiming((rank, width, *kernel), generator)
        return leaves

    def rank(self, leaves: Leaves) -> int:
        return leaves["lora_down"].shape[0]

    def weight_shape(self, leaves: Leaves) -> Shape:
        kernel = leaves.get("lora_mid", leaves["lora_down"]).shape[2:]
        return (leaves["lora_up"].shape[0], leaves["lora_down"].shape[1], *kernel)

    def thin_product(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        down = leaves["lora_down"]
        if "lora_mid" in leaves:
            down = torch.einsum("rs...,si->ri...", leaves["lora_mid"], down.flatten(1))
        return leaves["lora_up"].flatten(1), down.flatten(1)

    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:  # noqa: ARG002  (the factors have it)
        down, up = leaves["lora_down"], leaves["lora_up"]
        if "lora_mid" in leaves:
            down = torch.einsum("rs...,si->ri...", leaves["lora_mid"], down.flatten(1))
        return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """Down, (mid,) up: the matrix itself is never formed."""
        if not isinstance(layer, nn.Conv2d):
            return F.linear(F.linear(x, leaves["lora_down"]), leaves["lora_up"])
        if layer.groups > 1:  # each group of outputs has its own inputs, which one `down` cannot serve
            return super().forward(leaves, layer, x)
        if "lora_mid" in leaves:
            inner = run_layer(layer, F.conv2d(x, leaves["lora_down"]), leaves["lora_mid"])
        else:
            inner = run_layer(layer, x, leaves["lora_down"])
        return F.conv2d(inner, leaves["lora_up"])

    def add(self, out: Tensor, scale: float, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return super().add(out, scale, leaves, layer, x)
        return plus_product(out, scale, x, leaves["lora_down"], leaves["lora_up"])


LOW_RANK = LowRank()


def low_rank(down: Tensor, up: Tensor, alpha: float | None = None, mid: Tensor | None = None) -> FactorDelta:
    """A LoRA delta from its factors; without an alpha the scale is 1.

    Raises:
        ValueError: they do not fit together.
    """
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] == 0:
        raise ValueError(f"lora_down is {list(down.shape)} and lora_up {list(up.shape)}, which are no factors")
    if any(side != 1 for side in up.shape[2:]):
        raise ValueError(f"lora_up is {list(up.shape)}, but its kernel can only be of size one")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"lora_down has rank {down.shape[0]}, lora_up has rank {up.shape[1]}")
    leaves = {"lora_down": down, "lora_up": up} | ({} if mid is None else {"lora_mid": mid})
    return FactorDelta(LOW_RANK, leaves, float(down.shape[0]) if alpha is None else alpha)


def with_alpha(delta: FactorDelta, alpha: float) -> FactorDelta:
    """The same LoRA with another alpha: ``lora_up`` is multiplied so that ΔW stays what it was.

    It is so to the bit where the quotient of the two is a power of two, and else rounded once to ``lora_up``'s dtype.
    """
    if delta.alpha == alpha:
        return delta
    up = delta.leaves["lora_up"]
    scaled = (up.double() * (delta.alpha / alpha)).to(up.dtype)
    return replace(delta, leaves={**delta.leaves, "lora_up": scaled}, alpha=alpha)


@with_optional_dora
def read(leaves: Leaves, alpha: float | None) -> FactorDelta:
    """LoRA from its leaves, or DoRA; without an alpha the scale is 1."""
    strange = set(leaves) - {"lora_down", "lora_up", "lora_mid"}
    if strange or not {"lora_down", "lora_up"} <= set(leaves):
        raise ValueError(f"it has {', '.join(sorted(leaves))}, where a LoRA has lora_down and lora_up")
    return low_rank(leaves["lora_down"], leaves["lora_up"], alpha, leaves.get("lora_mid"))


class LoraOptions(FactorOptions):
    """What there is to set on LoRA beside rank and alpha."""

    dora: bool = False
    """Learn the length of each output apart from its direction (DoRA)"""
    rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank"""
    loraplus_ratio: float = Field(1.0, gt=0)
    """Factor on the learning rate of `up` (LoRA+, Hayou et al. 2024, arXiv:2402.12354, has 16)"""


def lora_layer(
    path: str,
    layer: nn.Module,
    generator: torch.Generator,
    spec: Spec,
    *,
    rank: int,
    alpha: float,
    tucker: bool = False,
) -> AdapterLayer:
    """LoRA or DoRA on one layer, of the rank and alpha given unless a key of its options says otherwise."""
    options: LoraOptions = spec.options
    rank, alpha = options.size(path, rank, alpha)
    if options.rslora:
        alpha *= math.sqrt(rank)  # what is kept is the alpha that gives this scale by alpha / rank
    rates = {"lora_up": options.loraplus_ratio}
    patch = FactorLayer(LowRank(tucker), layer, rank, alpha, generator, rates)
    return DoraLayer(patch, layer) if options.dora else patch


def attach(target: Any, spec: Spec) -> Attached:
    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        return lora_layer(path, layer, generator, spec, rank=spec.rank, alpha=spec.alpha)

    return attach_factors(target, spec, make)


METHOD = Method(
    name="lora",
    summary="a low-rank matrix added to each chosen layer: small, quick, opens everywhere",
    attach=attach,
    options=LoraOptions,
    read=read,
)
