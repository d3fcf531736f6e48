"""Methods that add a matrix: ΔW = (alpha / r) · f(leaves), for linear layers and convolutions.

A `Factors` is the maths of one such method: stateless, its leaves under the names that files give them. Everything
else, the live layer and the delta in memory, is the same for all of them and stands here.
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
from diffgraft.adapters.patterns import check_keys, chosen
from diffgraft.adapters.projections import laid_out

Leaves = Mapping[str, Tensor]
Shape = tuple[int, ...]
"""[out, in], or [out, in / groups, height, width]"""


class Factors(ABC):
    """One way to write a matrix by smaller tensors."""

    kind: str
    """Name of the method that reads such leaves."""
    is_lora: bool = False
    """Whether the leaves are those of LoRA."""
    is_low_rank: bool = False
    """Whether ΔW is the product of two thin matrices, which `thin_product` returns."""

    @abstractmethod
    def start(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Leaves for a weight of `shape`, such that ΔW is zero."""

    @abstractmethod
    def rank(self, leaves: Leaves) -> int:
        """The inner dimension."""

    def scale(self, leaves: Leaves, alpha: float) -> float:
        """What f(leaves) is multiplied with."""
        return alpha / self.rank(leaves)

    @abstractmethod
    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        """ΔW without its scale, in `shape`. Raises ValueError (or RuntimeError) where leaves and shape do not fit."""

    def weight_shape(self, leaves: Leaves) -> Shape | None:  # noqa: ARG002  (others tell by them)
        """The shape of the weight that leaves (on the meta device) are for; None where they do not tell."""
        return None

    def matrix_shape(self, leaves: Leaves) -> Shape | None:
        """The same as a matrix [out, in · height · width], which more leaves tell."""
        return self.weight_shape(leaves)

    def thin_product(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        """`up` [out, r] and `down` [r, in · height · width] whose product is ΔW without its scale, if `is_low_rank`."""
        raise NotImplementedError

    def forward(self, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """What ΔW, without its scale, makes of the layer's input; methods with a shorter way override this."""
        return run_layer(layer, x, self.weight(leaves, weight_shape(layer)))

    def add(self, out: Tensor, scale: float, leaves: Leaves, layer: nn.Module, x: Tensor) -> Tensor:
        """`out`, what the layer gave for `x`, and `scale` times what `forward` makes of it."""
        return torch.add(out, self.forward(leaves, layer, x).to(out.dtype), alpha=scale)


@dataclass(frozen=True, repr=False)
class FactorDelta(LinearDelta):
    """Leaves, and how they are read."""

    factors: Factors
    leaves: Leaves
    alpha: float

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
        return self.factors.weight_shape(_shadows(self.leaves))

    @property
    def matrix_shape(self) -> Shape | None:
        return self.factors.matrix_shape(_shadows(self.leaves))

    def thin_product(self, strength: float) -> tuple[Tensor, Tensor] | None:
        if not self.is_low_rank:
            return None
        up, down = self.factors.thin_product({name: leaf.float() for name, leaf in self.leaves.items()})
        return strength * self.scale * up, down

    @property
    def scale(self) -> float:
        return self.factors.scale(self.leaves, self.alpha)

    def delta(self, shape: Shape) -> Tensor:
        leaves = {name: leaf.float() for name, leaf in laid_out(self.leaves, shape).items()}
        return self.scale * self.factors.weight(leaves, shape)

    def fits(self, weight_shape: Shape) -> bool:
        shadows = _shadows(laid_out(self.leaves, weight_shape))
        try:
            return tuple(self.factors.weight(shadows, weight_shape).shape) == tuple(weight_shape)
        except (ValueError, RuntimeError, IndexError):
            return False


def _shadows(leaves: Leaves) -> dict[str, Tensor]:
    """The leaves on the meta device: they have shapes, and nothing is computed."""
    return {name: leaf.to("meta") for name, leaf in leaves.items()}


class FactorOptions(Options):
    """What there is to set on every such method."""

    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    """Part, block or pattern of a layer's path (`*` stands for anything) → its own rank: {"*.attn2.*": 16}; of several
    that match, the last counts"""
    alphas: dict[str, PositiveFloat] = Field(default_factory=dict)
    """The same → its own alpha; where it has none, another rank has the same scale as everywhere"""

    def size(self, path: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the layer at `path`, where others of its kind have these."""
        own = chosen(self.ranks, strip_text_model(path), rank)
        return own, chosen(self.alphas, strip_text_model(path), alpha if own == rank else alpha / rank * own)


def attach_factors(target: Any, spec: Spec, make: Make) -> AttachedLayers:
    """`make` on the layers of a `Spec` with `FactorOptions`.

    Raises:
        DiffgraftError: a key of its ranks or alphas means none of them.
    """
    paths = [strip_text_model(f"{part}.{path}") for part, inside in spec.paths.items() for path in inside]
    check_keys("options.ranks", spec.options.ranks, paths)
    check_keys("options.alphas", spec.options.alphas, paths)
    return AttachedLayers(target, spec, make)


class FactorLayer(AdapterLayer):
    """Factors on a live layer."""

    def __init__(
        self,
        factors: Factors,
        layer: nn.Module,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        leaves = factors.start(weight_shape(layer), rank, generator)
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf.float()) for name, leaf in leaves.items()})
        self._factors, self._alpha = factors, alpha
        self._scale = factors.scale(leaves, alpha)
        self._rates = {name: rate for name, rate in (rates or {}).items() if rate != 1}

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        leaves, x = self._given(x)
        return self._factors.add(out, self._scale, leaves, layer, x)

    def added(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What it adds to what the layer gives for `x`."""
        leaves, x = self._given(x)
        return self._scale * self._factors.forward(leaves, layer, x)

    def _given(self, x: Tensor) -> tuple[Leaves, Tensor]:
        """The leaves, and `x` in their precision."""
        leaves = dict(self.leaves.items())
        return leaves, cast_like(x, next(iter(leaves.values())))

    def weight(self, layer: nn.Module) -> Tensor:
        """ΔW for this layer, scale included."""
        return self._scale * self._factors.weight(dict(self.leaves.items()), weight_shape(layer))

    def load(self, delta: Delta, layer: nn.Module) -> None:
        if not isinstance(delta, FactorDelta) or delta.kind != self._factors.kind:
            what = delta.kind if delta.kind != self._factors.kind else "DoRA (options.dora=true of lora and locon)"
            raise ValueError(f"is a {what}, and what trains here is a {self._factors.kind}")
        shape = weight_shape(layer)
        if not delta.fits(shape):
            raise ValueError(f"is for a layer of another shape than {' × '.join(map(str, shape))}, which this base has")
        device = next(self.parameters()).device
        leaves = sorted(laid_out(delta.leaves, shape).items())
        values = {name: leaf.to(device, torch.float32, copy=True) for name, leaf in leaves}
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in values.items()})
        self._alpha, self._scale = delta.alpha, delta.scale

    def delta(self) -> FactorDelta:
        return FactorDelta(self._factors, to_cpu_float32(dict(self.leaves.items())), self._alpha)

    def rates(self) -> dict[str, float]:
        return {name: rate for name, rate in self._rates.items() if name in self.leaves}


def plus_product(out: Tensor, scale: float, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`out` + `scale` · up · down · x for a linear layer, the last product added as it is made where precisions allow.

    Shapes: `out` [..., out], `x` [..., in], `down` [r, in], `up` [out, r].
    """
    inner = F.linear(x, down)
    if not out.dtype == inner.dtype == up.dtype:
        return torch.add(out, F.linear(inner, up).to(out.dtype), alpha=scale)
    return torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=scale).view(out.shape)


def kaiming(shape: Shape, generator: torch.Generator) -> Tensor:
    """Uniform in ±1/√fan_in, the fan-in being the product of all sides but the first: what PyTorch's own layers do."""
    bound = torch.tensor(shape[1:]).prod().item() ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
