"""Methods that add a matrix: ΔW = (alpha / r) · f(leaves), for linear layers and convolutions.

A `Factors` object is the mathematics of one such method: it is stateless, and its leaves have the names that files use.
The live layer and the delta in memory are the same for all these methods, and are defined here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.method import Options, Spec, strip_text_model
from diffgraft.adapters.patch import (
    AdapterLayer,
    AttachedLayers,
    Make,
    cast_like,
    run_layer,
    to_cpu_float32,
    weight_shape,
)
from diffgraft.adapters.patterns import check_pattern_keys, last_matching_value
from diffgraft.adapters.projections import match_conv_axes
from diffgraft.adapters.rank_schedule import RankSchedule

Leaves = Mapping[str, Tensor]
Shape = tuple[int, ...]
"""Shape of a weight: [out, in], or [out, in / groups, height, width]"""


class Factors(ABC):
    """One parametrization of a matrix ΔW by smaller tensors, its leaves."""

    kind: str
    """Name of the method that reads such leaves."""
    is_lora: bool = False
    """Whether the leaves are those of LoRA."""
    is_low_rank: bool = False
    """Whether ΔW is the product of two thin matrices, which `low_rank_factors` then returns."""

    @abstractmethod
    def init_leaves(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Create the initial leaves for a weight of `shape`, such that ΔW is zero."""

    @abstractmethod
    def rank(self, leaves: Leaves) -> int:
        """Inner dimension of the factors, by which alpha is divided."""

    def scale(self, leaves: Leaves, alpha: float) -> float:
        """Return the factor on the result of `weight`: alpha / rank, unless a method defines another."""
        return alpha / self.rank(leaves)

    @abstractmethod
    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        """Compute ΔW without its scale, in `shape`. Raises ValueError or RuntimeError if leaves do not fit it."""

    def weight_shape(self, leaves: Leaves) -> Shape | None:  # noqa: ARG002  (subclasses use them)
        """Shape of the adapted weight, from the shapes of the tensors in `leaves`; None if they do not determine it."""
        return None

    def matrix_shape(self, leaves: Leaves) -> Shape | None:
        """Shape of the weight as a matrix [out, in · height · width], where the leaves tell only that."""
        return self.weight_shape(leaves)

    def low_rank_factors(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        """Return `up` [out, r] and `down` [r, in · height · width] with up · down = ΔW without its scale.

        Only factors with `is_low_rank` implement it.
        """
        raise NotImplementedError

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply ΔW, without its scale, to the layer's input; methods with a cheaper computation override this."""
        return run_layer(layer, x, self.weight(leaves, weight_shape(layer)))

    def add(self, out: Tensor, scale: float, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """Return `out` (the layer's output for `x`) plus `scale` times the result of `forward`."""
        return torch.add(out, self.forward(leaves, layer, x).to(out.dtype), alpha=scale)


@dataclass(frozen=True, repr=False)
class FactorDelta(LinearDelta):
    """Leaves together with the `Factors` that interpret them."""

    factors: Factors
    leaves: Leaves
    alpha: float
    rank_schedule: RankSchedule | None = None
    """Of a LoRA, how many ranks act at a timestep; all matrices here are those of all ranks"""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.factors.kind

    @property
    def is_lora(self) -> bool:  # type: ignore[override]
        return self.factors.is_lora

    @property
    def is_low_rank(self) -> bool:  # type: ignore[override]
        return self.factors.is_low_rank

    @property
    def rank(self) -> int:
        return self.factors.rank(self.leaves)

    @property
    def weight_shape(self) -> Shape | None:
        return self.factors.weight_shape(_on_meta(self.leaves))

    @property
    def matrix_shape(self) -> Shape | None:
        return self.factors.matrix_shape(_on_meta(self.leaves))

    def low_rank_factors(self, strength: float) -> tuple[Tensor, Tensor] | None:
        if not self.is_low_rank:
            return None
        up, down = self.factors.low_rank_factors({name: leaf.float() for name, leaf in self.leaves.items()})
        return strength * self.scale * up, down

    @property
    def scale(self) -> float:
        return self.factors.scale(self.leaves, self.alpha)

    def delta(self, shape: Shape) -> Tensor:
        leaves = {name: leaf.float() for name, leaf in match_conv_axes(self.leaves, shape).items()}
        return self.scale * self.factors.weight(leaves, shape)

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """Add ΔW; that of a LoRA is added as it is multiplied out, so that it is never held apart."""
        factors = self.low_rank_factors(strength) if self.is_lora else None
        if factors is None:
            return super().apply(weight, bias, strength)
        up, down = (factor.to(weight.device) for factor in factors)
        return torch.addmm(weight.float().flatten(1), up, down).view(weight.shape), bias

    def fits(self, weight_shape: Shape) -> bool:
        leaves = _on_meta(match_conv_axes(self.leaves, weight_shape))
        try:
            return tuple(self.factors.weight(leaves, weight_shape).shape) == tuple(weight_shape)
        except (ValueError, RuntimeError, IndexError):
            return False


def _on_meta(leaves: Leaves) -> dict[str, Tensor]:
    """Move the leaves to the meta device: they keep their shapes, and nothing is computed with them."""
    return {name: leaf.to("meta") for name, leaf in leaves.items()}


class RankOptions(Options):
    """Options that every method made of factors has."""

    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    """Part, block or pattern of a module path (`*` matches anything) → rank of these modules: {"*.attn2.*": 16}; if
    several match, the last one counts"""
    alphas: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Part, block or pattern of a module path → alpha of these modules; unset: a module with another rank keeps the
    scale alpha / rank of all others"""

    def size(self, path: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the layer at `path`; `rank` and `alpha` are the values where no key matches."""
        layer_rank = last_matching_value(self.ranks, strip_text_model(path), rank)
        default_alpha = alpha if layer_rank == rank else alpha / rank * layer_rank
        return layer_rank, last_matching_value(self.alphas, strip_text_model(path), default_alpha)


def attach_factors(target: Any, spec: Spec, make: Make) -> AttachedLayers:
    """Attach the layers built by `make` to the layers of a `Spec` with `RankOptions`.

    Raises:
        DiffgraftError: a key of the options `ranks` or `alphas` matches no adapted layer.
    """
    check_patterns(spec)
    return AttachedLayers(target, spec, make)


def check_patterns(spec: Spec) -> None:
    """Raise DiffgraftError if a key of the options `ranks` or `alphas` matches no layer of a `Spec`."""
    paths = [strip_text_model(f"{part}.{path}") for part, layers in spec.paths.items() for path in layers]
    check_pattern_keys("options.ranks", spec.options.ranks, paths)
    check_pattern_keys("options.alphas", spec.options.alphas, paths)


class FactorLayer(AdapterLayer):
    """Factor matrices of a method, attached to a layer of a live model."""

    def __init__(
        self,
        factors: Factors,
        layer: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        leaves = factors.init_leaves(weight_shape(layer), rank, generator)
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf.float()) for name, leaf in leaves.items()})
        self._factors, self._alpha = factors, alpha
        self._scale = factors.scale(leaves, alpha)
        self._lr_scales = {name: scale for name, scale in (lr_scales or {}).items() if scale != 1}

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        leaves, x = self._leaves_and_input(x)
        return self._factors.add(out, self._scale, leaves, layer, x)

    def contribution(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute what the adapter adds to the layer's output for the input `x`."""
        leaves, x = self._leaves_and_input(x)
        return self._scale * self._factors.forward(leaves, layer, x)

    def _leaves_and_input(self, x: Tensor) -> tuple[Leaves, Tensor]:
        """The leaves, and `x` cast to their dtype."""
        leaves = dict(self.leaves.items())
        return leaves, cast_like(x, next(iter(leaves.values())))

    def weight(self, layer: nn.Module) -> Tensor:
        """Compute ΔW for this layer, scale included."""
        return self._scale * self._factors.weight(dict(self.leaves.items()), weight_shape(layer))

    def load(self, delta: Delta, layer: nn.Module) -> None:
        if delta.rank_schedule is not None:
            raise ValueError("has ranks by timestep (T-LoRA), which only method=tlora trains")
        if not isinstance(delta, FactorDelta) or delta.kind != self._factors.kind:
            kind = delta.kind if delta.kind != self._factors.kind else "DoRA (options.dora=true of lora and locon)"
            raise ValueError(f"is a {kind}, but this run trains a {self._factors.kind}")
        shape = weight_shape(layer)
        if not delta.fits(shape):
            raise ValueError(f"does not fit this base's layer of shape {' × '.join(map(str, shape))}")
        device = next(self.parameters()).device
        leaves = sorted(match_conv_axes(delta.leaves, shape).items())
        values = {name: leaf.to(device, torch.float32, copy=True) for name, leaf in leaves}
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in values.items()})
        self._alpha, self._scale = delta.alpha, delta.scale

    def delta(self) -> FactorDelta:
        return FactorDelta(self._factors, to_cpu_float32(dict(self.leaves.items())), self._alpha)

    def lr_scales(self) -> dict[str, float]:
        return {name: scale for name, scale in self._lr_scales.items() if name in self.leaves}


def add_product(out: Tensor, scale: float, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return `out` + `scale` · up · down · x for a linear layer, with one fused product and sum where dtypes allow it.

    Shapes: `out` [..., out], `x` [..., in], `down` [r, in], `up` [out, r].
    """
    inner = F.linear(x, down)
    if not out.dtype == inner.dtype == up.dtype:
        return torch.add(out, F.linear(inner, up).to(out.dtype), alpha=scale)
    return torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=scale).view(out.shape)


def without_bias(layer: nn.Module, out: Tensor) -> Tensor:
    """Return a layer's output without its bias: W · x, in the shape of `out`, channels last or [n, out, h, w]."""
    bias = getattr(layer, "bias", None)
    return out if bias is None else out - _in_shape(layer, bias, out)


def scaled(layer: nn.Module, out: Tensor, factors: Tensor) -> Tensor:
    """Return `out`, of the layer's output shape, times a factor for each channel."""
    return out * _in_shape(layer, factors, out)


def _in_shape(layer: nn.Module, values: Tensor, out: Tensor) -> Tensor:
    """One value for each output channel, in a shape that is broadcast to `out`."""
    return values.to(out.dtype).view((1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,))


def kaiming(shape: Shape, generator: torch.Generator) -> Tensor:
    """Uniform in ±1/√fan_in, as PyTorch initializes its layers; fan_in is the product of all sides but the first."""
    bound = torch.tensor(shape[1:]).prod().item() ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
