"""A frozen base's linear layers in 8 or 4 bits a weight: they compute with what the bits stand for.

The weights alone are rounded, once. Activations stay as they come, products are made in their precision, and gradients
flow through to what lies before. Convolutions, norms, embeddings, biases and the VAE are left as they are.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Quantize = Literal["none", "int8", "nf4"]
Change = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Weight [out, in] and bias [out] in float32 → others in their places."""

_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Of a weight; with them go the scales of nf4's blocks, while those of int8's rows are few"""


class Quantized(nn.Linear):
    """A linear layer whose weight is kept in few bits; each kind is one class in `bits.py`.

    The forward is not bitsandbytes' own. That of 8 bits rounds activations as well (on processors only while the layer
    is in evaluation mode) and keeps them through gradient checkpointing; that of 4 bits repacks weights in evaluation
    mode, on processors with AVX512-BF16, into a form from which no gradient flows; both may cast the bias for good.
    """

    weight: Any
    """The bits, in a parameter of the kind's own"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes: list[Change] = []
        """What lies over the weight now, in order: a graft's merge, as its bits cannot take one"""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the bits stand for, [out, in], in `dtype`."""

    def read(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] that it computes with, in `dtype`, what lies over them included."""
        weight = self.dequantized(torch.float32 if self.changes else dtype)
        bias: Tensor | None = None if self.bias is None else self.bias.to(weight.dtype)
        for change in self.changes:
            weight, bias = change(weight, bias)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the precision of `x`, or autocast's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """x · Wᵀ + b of a frozen layer; W is read again on the way back, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return F.linear(x, *layer.read(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, _ = ctx.layer.read(grad.dtype)
        return grad @ weight, None


def held_bytes(part: nn.Module, to: Quantize) -> int:
    """Bytes of the weights of a whole part, as they would be in `to`."""
    rounded = {id(layer.weight) for layer in part.modules() if type(layer) is nn.Linear and to != "none"}
    values = ((value, _BYTES[to] if id(value) in rounded else value.element_size()) for value in part.parameters())
    return round(sum(value.numel() * each for value, each in values))


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What a layer computes with: weight [out, in, …] and bias [out]; of a `Quantized` one as its bits read."""
    if isinstance(layer, Quantized):
        return layer.read()
    return layer.get_parameter("weight"), getattr(layer, "bias", None)
