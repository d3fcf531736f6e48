"""Quantized layers with 8 and 4 bits per weight: bitsandbytes' storage with the forward of `Quantized`."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Int8Params, Linear8bitLt, LinearNF4, Params4bit
from torch import Tensor, nn

from diffgraft.bases.quantized import Quantized


class Int8(Quantized, Linear8bitLt):  # type: ignore[misc]
    """A linear layer with 8 bits per weight: each row is divided by its largest magnitude and rounded to 127 steps.

    This is the quantization of weights in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 2.1).
    """

    def __init__(self, plain: nn.Linear) -> None:
        size = (plain.in_features, plain.out_features, plain.bias is not None)
        super().__init__(*size, has_fp16_weights=False, device="meta")
        self.weight = Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        self.weight.CB = None  # another reference to the same data, which copies would hold twice
        self.bias = plain.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        # bitsandbytes' own int8_vectorwise_dequant does not work in place, and takes twice the memory and time
        weight: Tensor = self.weight.data.float().mul_(self.weight.SCB.view(-1, 1) / 127)
        return weight.to(dtype)

    def move_scales(self, device: torch.device) -> None:
        self.weight.SCB = self.weight.SCB.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8":
        scales = self.weight.SCB
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight.SCB = scales.to(self.weight.device)  # moved, but kept in float32
        return self


class Nf4(Quantized, LinearNF4):  # type: ignore[misc]
    """A linear layer with 4 bits per weight: one of 16 fixed values, times the scale of its block of 64 weights.

    The 16 values are quantiles of a normal distribution, and the scales are stored in 8 bits (Dettmers et al. 2023,
    arXiv:2305.14314, section 3).
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        self.bias = plain.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight.to(dtype)

    def move_scales(self, device: torch.device) -> None:
        self.weight.quant_state.to(device)


KINDS: dict[str, Callable[[nn.Linear], Quantized]] = {"int8": Int8, "nf4": Nf4}
