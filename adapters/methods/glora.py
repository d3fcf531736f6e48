"""GLoRA: low-rank matrices on the input of a layer and beside it (Chavan et al. 2023, arXiv:2306.07967).

Of the paper's five terms, LyCORIS implements the two that change the weight: W' = W + strength · s · (W · A + B), with
A = a1 · a2 on the inputs, B = b1 · b2, and s = alpha / rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import RankOptions, attach_factors, kaiming, without_bias
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AdapterLayer, cast_like, run_layer, to_cpu_float32, weight_shape
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


class GloraLayer(AdapterLayer):
    """GLoRA on a live layer: W · (A · x) and B · x beside its output.

    W is the base's own weight, without what adapters that were attached before add to it.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Start without an effect: the first factors as PyTorch initializes layers, the second ones with zero.

        The rank is at most the number of inputs, as the order of a file's factors is told by their sides.
        """
        super().__init__()
        out, width, *kernel = weight_shape(layer)
        rank, alpha = min(rank, width), alpha / rank * min(rank, width)
        ones = [1] * len(kernel)
        leaves = {
            "a1": kaiming((width, rank, *ones), generator),
            "a2": torch.zeros(rank, width, *ones),
            "b1": kaiming((out, rank, *ones), generator),
            "b2": torch.zeros(rank, width, *kernel),
        }
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in leaves.items()})
        self._alpha = alpha

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        a1, a2, b1, b2 = (self.leaves[name] for name in _LEAVES)
        given, scale = cast_like(x, a1), self._alpha / a2.shape[0]
        if isinstance(layer, nn.Conv2d):
            n, groups = len(given), layer.groups
            each = given.reshape(n * groups, -1, *given.shape[2:])
            changed = F.conv2d(F.conv2d(each, a2), a1).view(given.shape)
            beside = b2.repeat(groups, *[1] * (b2.ndim - 1))  # b2 sees each group's inputs, b1 has each group's outputs
            inner = run_layer(layer, given, beside)
            added = F.conv2d(inner, b1, groups=groups)
        else:
            changed = F.linear(F.linear(given, a2), a1)
            added = F.linear(F.linear(given, b2), b1)
        of_input = without_bias(layer, layer.forward(changed.to(x.dtype)))
        return torch.add(out, (of_input + added).to(out.dtype), alpha=scale)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        if not isinstance(delta, GloraDelta) or not delta.fits(weight_shape(layer)) or "bm" in delta.leaves:
            raise ValueError(f"is a {delta.kind} that does not fit this layer, or has a core, which is not trained")
        device = self.leaves["a1"].device
        factors = dict(zip(_LEAVES, delta._factors(), strict=True))
        self.leaves = nn.ParameterDict(
            {name: nn.Parameter(leaf.to(device, torch.float32, copy=True)) for name, leaf in factors.items()}
        )
        self._alpha = delta.alpha

    def delta(self) -> GloraDelta:
        return GloraDelta(to_cpu_float32(dict(self.leaves.items())), self._alpha)


def attach(target: Any, spec: Spec) -> Attached:
    options: RankOptions = spec.options

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        return GloraLayer(layer, *options.size(path, spec.rank, spec.alpha), generator)

    return attach_factors(target, spec, make)


METHOD = Method(
    name="glora",
    summary="low-rank matrices on a layer's input and beside it: ΔW that knows the weight",
    attach=attach,
    options=RankOptions,
    read=read,
)
