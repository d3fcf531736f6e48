"""A linear layer that is used many times in one pass, its weight's gradient made but once.

Autograd makes a gradient of the weight's size for each use and adds them up: of a large matrix used on few tokens that
is mostly moving memory. Here every use notes its input and its output's gradient, and one product over all of them
gives the same sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Noted = list[tuple[Tensor, Tensor]]
"""Input [tokens, in] and gradient of the output [tokens, out], of each use"""


class SharedLinear(nn.Linear):
    """A linear layer that is told when a pass begins; without being told, it is any other."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._noted: Noted = []
        self._tap: Tensor | None = None

    def begin(self) -> None:
        """From now on, uses belong to a new pass."""
        self._tap = None
        if torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling():
            self._noted = []
            self._tap = _Gather.apply(self.weight, self._noted)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        plain = not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        if self._tap is None or plain:
            return F.linear(x, self.weight, self.bias)
        used: Tensor = _Use.apply(x, self._tap, self._noted)  # type: ignore[no-untyped-call]
        return used + self.bias


class _Use(torch.autograd.Function):
    """x [..., in], weight [out, in] → x · weightᵀ; the weight's gradient is left to `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, noted: Noted) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noted = noted
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.noted.append((x.flatten(0, -2), grad.flatten(0, -2)))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


class _Gather(torch.autograd.Function):
    """The weight as it is; its gradient is made when all uses have noted theirs, which autograd's order ensures."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, noted: Noted) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.noted = noted
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        if not ctx.noted:
            return None, None
        inputs, gradients = (torch.cat(side) for side in zip(*ctx.noted, strict=True))
        ctx.noted.clear()
        return gradients.t() @ inputs, None
