"""(IA)³: the inputs or the outputs of a layer, each scaled by a learned factor (Liu et al. 2022, arXiv:2205.05638).

The paper scales keys, values, and the inputs of the second layer of feed-forward blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import scaled, without_bias
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Options, Spec, strip_text_model
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers, weight_shape
from diffgraft.adapters.patterns import check_pattern_keys, last_matching_value


@dataclass(frozen=True, repr=False)
class Ia3Delta(Delta):
    """W' = W · (1 + strength · w), along the inputs or the outputs; as in LyCORIS' merging, the bias is unchanged."""

    leaves: Mapping[str, Tensor]
    """``weight`` [in or out] (for convolutions [1, in or out, 1, 1]), and ``on_input`` 0 or 1"""

    kind = "ia3"
    alpha = None

    @property
    def on_input(self) -> bool:
        """Whether the inputs are scaled, and not the outputs."""
        return bool(self.leaves["on_input"].item())

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        factors = 1 + strength * self.leaves["weight"].float().flatten().to(weight.device)
        shape = [1] * weight.ndim
        shape[1 if self.on_input else 0] = -1
        return weight.float() * factors.view(shape), bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        axis = 1 if self.on_input else 0
        return len(weight_shape) > 1 and self.leaves["weight"].numel() == weight_shape[axis]


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  ((IA)³ has no alpha)
    """Build (IA)³ from its leaves; without ``on_input``, outputs are scaled. Raises ValueError for invalid leaves."""
    if "weight" not in leaves or not set(leaves) <= {"weight", "on_input"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of (IA)³")
    weight = leaves["weight"]
    if weight.ndim == 0 or max(weight.shape) != weight.numel():
        raise ValueError(f"its weight has shape {list(weight.shape)}; expected one factor per input or output")
    on_input = leaves.get("on_input", torch.tensor(0))
    if on_input.numel() != 1:
        raise ValueError(f"its on_input has shape {list(on_input.shape)}; expected a single number")
    return Ia3Delta({"weight": weight, "on_input": on_input})


class Ia3Options(Options):
    """Options of (IA)³."""

    on_input: list[str] = Field(default_factory=lambda: ["*.ff.net.2", "*.fc2"])
    """Patterns of module paths (`*` matches anything) whose inputs are scaled; of all others the outputs are"""


class Ia3Layer(AdapterLayer):
    """Factors on the inputs or the outputs of a live layer; its bias is unchanged.

    Factors on inputs see the base's own weight, without what adapters that were attached before add to it.
    """

    def __init__(self, layer: nn.Module, on_input: bool) -> None:
        super().__init__()
        out, width, *kernel = weight_shape(layer)
        side = width if on_input else out
        self.weight = nn.Parameter(torch.zeros((1, side, *[1] * len(kernel)) if kernel else (side,)))
        self._on_input = on_input

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        if not self._on_input:
            return out + scaled(layer, without_bias(layer, out), self.weight)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        factors = self.weight.repeat(1, groups, 1, 1) if groups > 1 else self.weight
        return out + without_bias(layer, layer.forward(x * factors.to(x.dtype)))

    def load(self, delta: Delta, layer: nn.Module) -> None:
        if not isinstance(delta, Ia3Delta) or delta.on_input != self._on_input or not delta.fits(weight_shape(layer)):
            raise ValueError(
                f"is of the method {delta.kind}; does not fit this layer, or scales its other side (options.on_input)"
            )
        with torch.no_grad():
            self.weight.copy_(delta.leaves["weight"].float().view(self.weight.shape))

    def delta(self) -> Ia3Delta:
        weight = self.weight.detach().float().cpu().clone()
        return Ia3Delta({"weight": weight, "on_input": torch.tensor(int(self._on_input))})


def attach(target: Any, spec: Spec) -> Attached:
    options: Ia3Options = spec.options
    patterns = dict.fromkeys(options.on_input, True)
    if "on_input" in options.model_fields_set:
        paths = [strip_text_model(f"{part}.{path}") for part, layers in spec.paths.items() for path in layers]
        check_pattern_keys("options.on_input", patterns, paths)

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:  # noqa: ARG001  (zeros)
        return Ia3Layer(layer, last_matching_value(patterns, strip_text_model(path), False))

    return AttachedLayers(target, spec, make)


METHOD = Method(
    name="ia3",
    summary="one factor for each input or output of a layer: the smallest file that changes layers",
    attach=attach,
    options=Ia3Options,
    layers="attention+feedforward",
    unsupported=NO_FACTORS,
    read=read,
)
