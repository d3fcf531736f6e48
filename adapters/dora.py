"""DoRA: the length of each output apart from its direction (Liu et al. 2024, arXiv:2402.09353, equation 5).

W' = m · (W + ΔW) / ‖W + ΔW‖, where ΔW is LoRA's, or any other that adds a matrix. Files of LyCORIS may have the norm of
each input in the place of each output's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import FactorDelta, FactorLayer, Leaves, Shape
from diffgraft.adapters.method import ReadDelta
from diffgraft.adapters.patch import AdapterLayer, weight_shape
from diffgraft.bases.quantized import weight_and_bias
from diffgraft.errors import DiffgraftError

PEFT, LYCORIS = "peft", "lycoris"
"""Whose way of a strength other than 1 is followed."""
LEAF = "dora_scale"


@dataclass(frozen=True, repr=False)
class DoraDelta(Delta):
    """W' = m · V / ‖V‖, with V = W + ΔW."""

    direction: FactorDelta
    magnitude: Tensor
    """m: [out] or [out, 1, …] of the outputs, [1, in, …] of the inputs"""
    follows: str = PEFT
    """At other strengths s, peft has m · V / ‖V‖ with V = W + s · ΔW; LyCORIS has V · (1 + s · (m / ‖V‖ − 1)) with the
    whole ΔW, in ``lycoris/functional/general.py``"""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.direction.kind

    @property
    def leaves(self) -> Leaves:  # type: ignore[override]
        return {**self.direction.leaves, LEAF: self.magnitude}

    @property
    def alpha(self) -> float:  # type: ignore[override]
        return self.direction.alpha

    @property
    def is_lora(self) -> bool:  # type: ignore[override]
        return self.direction.is_lora

    @property
    def weight_shape(self) -> Shape | None:
        return self.direction.weight_shape

    @property
    def matrix_shape(self) -> Shape | None:
        return self.direction.matrix_shape

    @property
    def of_inputs(self) -> bool:
        """Whether the norms are those of the inputs."""
        return self.magnitude.ndim > 1 and self.magnitude.shape[0] != self.magnitude.numel()

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        delta = self.direction.delta(tuple(weight.shape)).to(weight.device)
        v = weight + (delta if self.follows == LYCORIS else strength * delta)
        axis = 1 if self.of_inputs else 0
        norm = torch.linalg.vector_norm(v.transpose(0, axis).flatten(1), dim=1)
        factor = self.magnitude.float().flatten().to(weight.device) / norm.clamp_min(torch.finfo(v.dtype).tiny)
        if self.follows == LYCORIS:
            factor = 1 + strength * (factor - 1)
        sides = [1] * v.ndim
        sides[axis] = -1
        return v * factor.view(sides), bias

    def fits(self, weight_shape: Shape) -> bool:
        axis = 1 if self.of_inputs else 0
        return (
            len(weight_shape) > 1 and self.magnitude.numel() == weight_shape[axis] and self.direction.fits(weight_shape)
        )


def with_optional_dora(read: Callable[[Leaves, float | None], FactorDelta]) -> ReadDelta:
    """`read`, for leaves among which there may be a ``dora_scale``."""

    def read_either(leaves: Leaves, alpha: float | None) -> Delta:
        found = read({name: leaf for name, leaf in leaves.items() if name != LEAF}, alpha)
        if LEAF not in leaves:
            return found
        magnitude = leaves[LEAF]
        if sum(side != 1 for side in magnitude.shape) > 1 or magnitude.ndim == 0:
            raise ValueError(f"dora_scale is {list(magnitude.shape)}, which is no row of norms")
        delta = DoraDelta(found, magnitude)
        # LoRA's leaves tell how many axes the weight has, so that the row can be made a column again
        return delta if delta.of_inputs or "lora_down" not in leaves else DoraDelta(found, magnitude.flatten())

    return read_either


def with_strength_convention(delta: Delta, tool: str) -> Delta:
    """`delta`, with strengths as `tool` has them where tools differ.

    Raises:
        ValueError: there is no such tool here.
    """
    if not isinstance(delta, DoraDelta):
        return delta
    if tool not in (PEFT, LYCORIS):
        raise ValueError(f"strengths are said to follow {tool!r}; known are {PEFT} and {LYCORIS}")
    return replace(delta, follows=tool)


class DoraLayer(AdapterLayer):
    """DoRA on a live layer. As in the paper (section 4.3) no gradient flows through the norm."""

    def __init__(self, direction: FactorLayer, layer: nn.Module) -> None:
        super().__init__()
        weight, _ = weight_and_bias(layer)
        if not weight.is_floating_point() or weight.shape != weight_shape(layer):
            raise DiffgraftError(
                "DoRA needs the weights of the base, which are quantised here: set options.dora=false."
            )
        self.direction = direction
        self.magnitude = nn.Parameter(norms(weight.detach().float()))

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        weight, own = weight_and_bias(layer)
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = out.new_zeros(1) if own is None else own.view(shape)
        with torch.no_grad():
            norm = norms(weight.float() + self.direction.weight(layer))
        factor = (self.magnitude / norm).view(shape)
        return (factor * (out - bias + self.direction.added(layer, x).to(out.dtype)) + bias).to(out.dtype)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Of a delta without norms they are those that layer and delta have together."""
        if isinstance(delta, DoraDelta) and delta.of_inputs:
            raise ValueError("has the norms of its inputs, and what trains here are those of the outputs")
        if isinstance(delta, DoraDelta) and not delta.fits(weight_shape(layer)):
            raise ValueError("has norms for a layer of another shape than this base has")
        self.direction.load(delta.direction if isinstance(delta, DoraDelta) else delta, layer)
        with torch.no_grad():
            if isinstance(delta, DoraDelta):
                self.magnitude.copy_(delta.magnitude.flatten())
            else:
                self.magnitude.copy_(norms(layer.get_parameter("weight").float() + self.direction.weight(layer)))

    def delta(self) -> DoraDelta:
        return DoraDelta(self.direction.delta(), self.magnitude.detach().float().cpu().clone())

    def rates(self) -> dict[str, float]:
        return {f"direction.{name}": rate for name, rate in self.direction.rates().items()}


def norms(weight: Tensor) -> Tensor:
    """Norm of each output of a weight [out, …], [out]."""
    found: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return found
