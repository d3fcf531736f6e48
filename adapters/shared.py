"""A linear layer for many uses in one forward pass, with its parameters' gradients computed only once.

Autograd computes a gradient of the weight's size for each use and adds them up. For a large matrix that is used on few
tokens, most of that time is spent moving memory. Here each use records its input and the gradient of its output, and
one product over all uses gives the same sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffgraft.adapters.patch import is_autocast

Uses = list[tuple[int, Tensor, Tensor]]
"""Uses of the layer: id of the backward pass, input [tokens, in], and gradient of the output [tokens, out]"""


class DeferredGradLinear(nn.Linear):
    """A linear layer that computes its weight gradient once for all its uses since `begin_pass`.

    Inputs and output gradients of the uses are collected, and multiplied when the backward pass has reached the last.

    Without a call of `begin_pass` it behaves like `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._deferred: tuple[Tensor, Tensor] | None = None
        self._uses: Uses = []

    def begin_pass(self) -> None:
        """Assign all uses from now on to a new forward pass.

        In a pass without gradients the call does nothing, so that a pass with gradients that has begun can go on.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._deferred = None
        if self.weight.requires_grad:
            self._uses = []
            weight, bias = _GatherGrads.apply(self.weight, self.bias, self._uses)  # type: ignore[no-untyped-call]
            device = self.weight.device
            if is_autocast(device):  # autocast caches the half-precision copies of parameters, but not of these tensors
                half = torch.get_autocast_dtype(device.type)
                weight, bias = weight.to(half), bias.to(half)
            self._deferred = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if self._deferred is None or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        weight, bias = self._deferred
        out: Tensor = _DeferredMatmul.apply(x.to(weight.dtype), weight, bias, self._uses)  # type: ignore[no-untyped-call]
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies of the layer, which begin passes of their own."""
        return {**self.__dict__, "_deferred": None, "_uses": []}


class _DeferredMatmul(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] → x · weightᵀ + bias; `_GatherGrads` computes the weight gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, uses: Uses) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.uses.append((_this_backward(), x.flatten(0, -2), grad.flatten(0, -2)))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


class _GatherGrads(torch.autograd.Function):
    """Identity on weight and bias; computes their gradients in backward, which autograd runs after that of all uses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, uses: Uses) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.uses, ctx.dtype = uses, weight.dtype
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        # an earlier backward pass that did not ask for these gradients may have recorded uses too
        current = _this_backward()
        uses = [(x, grad) for backward, x, grad in ctx.uses if backward == current]
        ctx.uses.clear()
        if not uses:
            return None, None, None
        inputs, gradients = (torch.cat(side) for side in zip(*uses, strict=True))
        weight_grad = (gradients.t() @ inputs).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        bias_grad = gradients.sum(0).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return weight_grad, bias_grad, None


def _this_backward() -> int:
    """Id of the current backward pass; PyTorch's own checkpointing uses the same number."""
    return int(torch._C._current_graph_task_id())
