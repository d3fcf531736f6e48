"""A linear layer that is used many times in one pass, its parameters' gradients made but once.

Autograd makes a gradient of the weight's size for each use and adds them up: of a large matrix used on few tokens that
is mostly moving memory. Here every use notes its input and its output's gradient, and one product over all of them
gives the same sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffgraft.adapters.patch import is_autocast

Noted = list[tuple[int, Tensor, Tensor]]
"""Of each use: the backward pass it was noted in, input [tokens, in], and gradient of the output [tokens, out]"""


class DeferredGradLinear(nn.Linear):
    """A linear layer that is told when a pass begins; without being told, it is any other."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._deferred: tuple[Tensor, Tensor] | None = None
        self._noted: Noted = []

    def begin(self) -> None:
        """From now on, uses belong to a new pass. Passes without gradients need none, and leave one under way alone."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._deferred = None
        if self.weight.requires_grad:
            self._noted = []
            weight, bias = _GatherGrads.apply(self.weight, self.bias, self._noted)  # type: ignore[no-untyped-call]
            device = self.weight.device
            if is_autocast(device):  # which remembers the halves of parameters only, and not of these
                half = torch.get_autocast_dtype(device.type)
                weight, bias = weight.to(half), bias.to(half)
            self._deferred = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if self._deferred is None or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        weight, bias = self._deferred
        used: Tensor = _DeferredMatmul.apply(x.to(weight.dtype), weight, bias, self._noted)  # type: ignore[no-untyped-call]
        return used

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they begin passes of their own."""
        return {**self.__dict__, "_deferred": None, "_noted": []}


class _DeferredMatmul(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] → x · weightᵀ + bias; their gradients are left to `_GatherGrads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, noted: Noted) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noted = noted
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.noted.append((_this_backward(), x.flatten(0, -2), grad.flatten(0, -2)))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


class _GatherGrads(torch.autograd.Function):
    """Weight and bias as they are; their gradients are made when all uses have noted, as autograd's order ensures."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, noted: Noted) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.noted, ctx.dtype = noted, weight.dtype
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        # an earlier way back that did not ask for these gradients may have left notes of its own
        now = _this_backward()
        noted = [(x, grad) for backward, x, grad in ctx.noted if backward == now]
        ctx.noted.clear()
        if not noted:
            return None, None, None
        inputs, gradients = (torch.cat(side) for side in zip(*noted, strict=True))
        of_weight = (gradients.t() @ inputs).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradients.sum(0).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return of_weight, of_bias, None


def _this_backward() -> int:
    """A number for the backward pass under way; PyTorch's own checkpointing goes by it, too."""
    return int(torch._C._current_graph_task_id())
