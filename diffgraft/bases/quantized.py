"""Quantized linear layers of a frozen base, with 8 or 4 bits per weight, which compute with dequantized weights.

Only weights are quantized, once. Activations keep their dtype, products are computed in it, and gradients flow through
the layers. Convolutions, norms, embeddings, biases and the VAE are not quantized.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Quantize = Literal["none", "fp8", "int8", "nf4"]
Change = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Function of weight [out, in] and bias [out], both float32, that returns a changed weight and bias"""

_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Bytes per weight, including the scales of nf4's blocks; int8 has few scales, one for each row"""


class Quantized(nn.Linear):
    """A linear layer with a quantized weight; `bnb_layers` and `float8` in `diffgraft.bases` have the kinds.

    The forward is not bitsandbytes' own: its 8-bit forward also rounds activations (on CPUs only in evaluation mode)
    and keeps them despite gradient checkpointing. Its 4-bit forward repacks weights in evaluation mode, on CPUs with
    AVX512-BF16, into a form without gradients. Both may cast the bias permanently.
    """

    weight: Any
    """Quantized weight, for most kinds in a parameter class of bitsandbytes"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes: list[Change] = []
        """Changes that adapters make to the dequantized weight, in order"""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight [out, in] in `dtype`."""

    @abstractmethod
    def move_scales(self, device: torch.device) -> None:
        """Move the scales of the weight, but not the weight itself, to a device."""

    def read(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Return weight [out, in] and bias [out] after all `changes`, in `dtype`."""
        weight = self.dequantized(torch.float32 if self.changes else dtype)
        bias: Tensor | None = None if self.bias is None else self.bias.to(weight.dtype)
        for change in self.changes:
            weight, bias = change(weight, bias)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`, or in autocast's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """x · Wᵀ + b of a frozen layer; W is dequantized again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return F.linear(x, *layer.read(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, _ = ctx.layer.read(grad.dtype)
        return grad @ weight, None


def bytes_when_quantized(part: nn.Module, kind: Quantize) -> int:
    """Return the bytes of all weights of a network if its linear layers were quantized to `kind`."""
    quantized = {id(layer.weight) for layer in part.modules() if type(layer) is nn.Linear and kind != "none"}
    values = ((value, _BYTES[kind] if id(value) in quantized else value.element_size()) for value in part.parameters())
    return round(sum(value.numel() * size for value, size in values))


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, in, …] and bias [out] of a layer; those of a `Quantized` layer are dequantized."""
    if isinstance(layer, Quantized):
        return layer.read()
    return layer.get_parameter("weight"), getattr(layer, "bias", None)
