"""DoRA learns the norm of each output apart from its direction (Liu et al. 2024, arXiv:2402.09353, equation 5).

W' = m · (W + ΔW) / ‖W + ΔW‖, where ΔW is that of LoRA or of another method that adds a matrix. LyCORIS files may hold
the norm of each input instead of each output.
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
"""Tools that define differently what a strength other than 1 means for DoRA"""
LEAF = "dora_scale"


@dataclass(frozen=True, repr=False)
class DoraDelta(Delta):
    """W' = m · V / ‖V‖, with V = W + ΔW."""

    direction: FactorDelta
    magnitude: Tensor
    """m: [out] or [out, 1, …] for norms of the outputs, [1, in, …] for norms of the inputs"""
    strength_convention: str = PEFT
    """At a strength s other than 1, peft computes m · V / ‖V‖ with V = W + s · ΔW. LyCORIS computes
    V · (1 + s · (m / ‖V‖ − 1)) with the whole ΔW (``lycoris/functional/general.py``)"""

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
    def has_input_norms(self) -> bool:
        """Whether `magnitude` holds the norms of the inputs instead of the outputs."""
        return self.magnitude.ndim > 1 and self.magnitude.shape[0] != self.magnitude.numel()

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        delta = self.direction.delta(tuple(weight.shape)).to(weight.device)
        v = weight + (delta if self.strength_convention == LYCORIS else strength * delta)
        axis = 1 if self.has_input_norms else 0
        norm = torch.linalg.vector_norm(v.transpose(0, axis).flatten(1), dim=1)
        factor = self.magnitude.float().flatten().to(weight.device) / norm.clamp_min(torch.finfo(v.dtype).tiny)
        if self.strength_convention == LYCORIS:
            factor = 1 + strength * (factor - 1)
        sides = [1] * v.ndim
        sides[axis] = -1
        return v * factor.view(sides), bias

    def fits(self, weight_shape: Shape) -> bool:
        axis = 1 if self.has_input_norms else 0
        return (
            len(weight_shape) > 1 and self.magnitude.numel() == weight_shape[axis] and self.direction.fits(weight_shape)
        )


def with_optional_dora(read: Callable[[Leaves, float | None], FactorDelta]) -> ReadDelta:
    """Wrap a function that reads leaves, so that it also accepts a ``dora_scale`` among them and then builds DoRA."""

    def read_with_dora(leaves: Leaves, alpha: float | None) -> Delta:
        direction = read({name: leaf for name, leaf in leaves.items() if name != LEAF}, alpha)
        if LEAF not in leaves:
            return direction
        magnitude = leaves[LEAF]
        if sum(side != 1 for side in magnitude.shape) > 1 or magnitude.ndim == 0:
            raise ValueError(f"dora_scale has shape {list(magnitude.shape)}; expected one norm per output or input")
        delta = DoraDelta(direction, magnitude)
        # LoRA's leaves tell how many axes the weight has, so that the flat norms can be reshaped into a column again
        is_column = delta.has_input_norms or "lora_down" not in leaves
        return delta if is_column else DoraDelta(direction, magnitude.flatten())

    return read_with_dora


def with_strength_convention(delta: Delta, tool: str) -> Delta:
    """Return `delta` with the meaning that `tool` gives to strengths other than 1, where tools differ in it.

    Raises:
        ValueError: `tool` is not `peft` or `lycoris`.
    """
    if not isinstance(delta, DoraDelta):
        return delta
    if tool not in (PEFT, LYCORIS):
        raise ValueError(f"unknown tool {tool!r}: strengths of DoRA follow {PEFT} or {LYCORIS}")
    return replace(delta, strength_convention=tool)


class DoraLayer(AdapterLayer):
    """DoRA on a live layer. As in section 4.3 of the paper, no gradient flows through the norm."""

    has_strength = False

    def __init__(self, direction: FactorLayer, layer: nn.Module) -> None:
        super().__init__()
        weight, _ = weight_and_bias(layer)
        if not weight.is_floating_point() or weight.shape != weight_shape(layer):
            raise DiffgraftError("DoRA needs unquantized weights of the base: set options.dora=false or quantize=none.")
        self.direction = direction
        self.magnitude = nn.Parameter(weight_norms(weight.detach().float()))

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        weight, layer_bias = weight_and_bias(layer)
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        bias = out.new_zeros(1) if layer_bias is None else layer_bias.view(shape)
        with torch.no_grad():
            norm = weight_norms(weight.float() + self.direction.weight(layer))
        factor = (self.magnitude / norm).view(shape)
        return (factor * (out - bias + self.direction.contribution(layer, x).to(out.dtype)) + bias).to(out.dtype)

    def load(self, delta: Delta, layer: nn.Module) -> None:
        """Copy the values of `delta` into this layer. A LoRA has no norms: they are those of the merged W + ΔW."""
        if isinstance(delta, DoraDelta) and delta.has_input_norms:
            raise ValueError("is a DoRA with norms of the inputs; only DoRA with norms of the outputs can be trained")
        if isinstance(delta, DoraDelta) and not delta.fits(weight_shape(layer)):
            raise ValueError("is a DoRA for a layer of another shape than this base has")
        self.direction.load(delta.direction if isinstance(delta, DoraDelta) else delta, layer)
        with torch.no_grad():
            if isinstance(delta, DoraDelta):
                self.magnitude.copy_(delta.magnitude.flatten())
            else:
                self.magnitude.copy_(weight_norms(layer.get_parameter("weight").float() + self.direction.weight(layer)))

    def delta(self) -> DoraDelta:
        return DoraDelta(self.direction.delta(), self.magnitude.detach().float().cpu().clone())

    def lr_scales(self) -> dict[str, float]:
        return {f"direction.{name}": scale for name, scale in self.direction.lr_scales().items()}


def weight_norms(weight: Tensor) -> Tensor:
    """Norm of each output of a weight [out, …], as a tensor [out]."""
    per_output: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return per_output
