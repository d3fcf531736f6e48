"""LoRA: a low-rank matrix added to the weight (Hu et al. 2021, arXiv:2106.09685).

W' = W + (alpha / r) · up · down, with down [r, in] and up [out, r]; equation (3) and section 4.1 of the paper.
With `options.dora` the norm of each output is learned as well (see `dora.py`); with `options.rslora` the scale is
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
    Factors,
    Leaves,
    RankOptions,
    Shape,
    add_product,
    attach_factors,
    kaiming,
)
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, run_layer
from diffgraft.adapters.principal import Principal, PrincipalLayer, Start
from diffgraft.errors import DiffgraftError


class LowRank(Factors):
    """ΔW as the product of two thin matrices.

    Leaves: lora_down [r, in, …kernel], lora_up [out, r, …ones]; in the Tucker variant lora_down [r, in, 1, 1],
    lora_mid [r, r, …kernel].
    """

    kind = "lora"
    is_lora = is_low_rank = True

    def __init__(self, tucker: bool = False) -> None:
        self._tucker = tucker

    def init_leaves(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Initialize `down` as PyTorch initializes layers, and `up` with zero, as in the paper's reference code."""
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

    def low_rank_factors(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
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
        """Apply down, the core if there is one, and up in turn, so that ΔW is never formed."""
        if not isinstance(layer, nn.Conv2d):
            return F.linear(F.linear(x, leaves["lora_down"]), leaves["lora_up"])
        if layer.groups > 1:  # each group of outputs has its own inputs, which a single `down` cannot express
            return super().forward(leaves, layer, x)
        if "lora_mid" in leaves:
            inner = run_layer(layer, F.conv2d(x, leaves["lora_down"]), leaves["lora_mid"])
        else:
            inner = run_layer(layer, x, leaves["lora_down"])
        return F.conv2d(inner, leaves["lora_up"])

    def add(self, out: Tensor, scale: float, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return super().add(out, scale, leaves, layer, x)
        return add_product(out, scale, x, leaves["lora_down"], leaves["lora_up"])


LOW_RANK = LowRank()


def low_rank(down: Tensor, up: Tensor, alpha: float | None = None, mid: Tensor | None = None) -> FactorDelta:
    """Build a LoRA delta from its factors; without an alpha the scale is 1.

    Raises:
        ValueError: the factors do not fit together.
    """
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] == 0:
        raise ValueError(f"lora_down is {list(down.shape)} and lora_up {list(up.shape)}, which are not LoRA factors")
    if any(side != 1 for side in up.shape[2:]):
        raise ValueError(f"lora_up is {list(up.shape)}; its kernel must be of size 1")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"lora_down has rank {down.shape[0]}, lora_up has rank {up.shape[1]}")
    leaves = {"lora_down": down, "lora_up": up} | ({} if mid is None else {"lora_mid": mid})
    return FactorDelta(LOW_RANK, leaves, float(down.shape[0]) if alpha is None else alpha)


def with_alpha(delta: FactorDelta, alpha: float) -> FactorDelta:
    """Change the alpha of a LoRA without changing ΔW, by scaling ``lora_up``.

    The result is exact if the quotient of the two alphas is a power of two; else it is rounded once to ``lora_up``'s
    dtype.
    """
    if delta.alpha == alpha:
        return delta
    up = delta.leaves["lora_up"]
    scaled = (up.double() * (delta.alpha / alpha)).to(up.dtype)
    return replace(delta, leaves={**delta.leaves, "lora_up": scaled}, alpha=alpha)


@with_optional_dora
def read(leaves: Leaves, alpha: float | None) -> FactorDelta:
    """Build LoRA or DoRA from its leaves; without an alpha the scale is 1. Raises ValueError for invalid leaves."""
    unknown = set(leaves) - {"lora_down", "lora_up", "lora_mid"}
    if unknown or not {"lora_down", "lora_up"} <= set(leaves):
        raise ValueError(f"it has {', '.join(sorted(leaves))}; expected lora_down and lora_up, as in a LoRA")
    return low_rank(leaves["lora_down"], leaves["lora_up"], alpha, leaves.get("lora_mid"))


class LoraOptions(RankOptions):
    """Options of LoRA beside rank and alpha."""

    dora: bool = False
    """Learn the norm of each output apart from its direction (DoRA)"""
    rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank"""
    init: Start = "zero"
    """Start from zero, or from a part of the base's weight, which learns faster and makes files of twice the rank: its
    largest singular values (pissa), or the first columns of its QR decomposition (olora)"""
    pissa_niter: int = Field(0, ge=0, le=100)
    """Iterations of a randomized SVD for `init=pissa`, which takes a fraction of the time on large layers (as peft's
    pissa_niter_16); 0: the exact SVD"""
    loraplus_ratio: float = Field(1.0, gt=0)
    """Factor on the learning rate of `up` (LoRA+, Hayou et al. 2024, arXiv:2402.12354, uses 16)"""


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
    """Create LoRA or DoRA for one layer; `rank` and `alpha` apply unless a key of the options matches the layer."""
    options: LoraOptions = spec.options
    rank, alpha = options.size(path, rank, alpha)
    if options.rslora:
        alpha *= math.sqrt(rank)  # the saved alpha gives the rsLoRA scale by the usual alpha / rank
    if options.pissa_niter and options.init != "pissa":
        raise DiffgraftError("options.pissa_niter has no effect without options.init=pissa: remove it, or set that.")
    if options.init != "zero":
        return _principal_layer(path, layer, generator, options, (rank, alpha), tucker)
    lora = FactorLayer(LowRank(tucker), layer, rank, alpha, generator, {"lora_up": options.loraplus_ratio})
    return DoraLayer(lora, layer) if options.dora else lora


def _principal_layer(
    path: str,
    layer: nn.Module,
    generator: torch.Generator,
    options: LoraOptions,
    size: tuple[float, float],
    tucker: bool,
) -> AdapterLayer:
    """Create LoRA that starts from the weight; `size` is rank and alpha.

    Raises:
        DiffgraftError: it cannot be combined with the other options, or the layer is quantized by another tool.
    """
    for name, is_on in (("dora", options.dora), ("tucker", tucker)):
        if is_on:
            raise DiffgraftError(f"options.init={options.init} cannot be combined with options.{name}=true.")
    rank, alpha = size
    start = Principal(options.init, options.pissa_niter)
    lr_scales = {"lora_up": options.loraplus_ratio}
    try:
        return PrincipalLayer(LOW_RANK, layer, int(rank), alpha, generator, lr_scales, start)
    except ValueError as error:
        raise DiffgraftError(f"options.init={options.init} cannot start at {path}: {error}.") from error


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
