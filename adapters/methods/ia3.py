"""(IA)³: the inputs or the outputs of a layer, each scaled by a learned factor (Liu et al. 2022, arXiv:2205.05638).

It is read, merged and converted, but not trained here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta


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


KINDS = {"ia3": read}
