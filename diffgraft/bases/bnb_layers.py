"""Layers in 8 and in 4 bits a weight: bitsandbytes' own, which keep the bits, with the forward of `Quantized`."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Int8Params, Linear8bitLt, LinearNF4, Params4bit
from torch import Tensor, nn

from diffgraft.bases.quantized import Quantized


class Int8(Quantized, Linear8bitLt):  # type: ignore[misc]
    """Each row in 127 steps to either side of zero, of its largest magnitude.

    As the weights are in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 2.1).
    """

    def __init__(self, plain: nn.Linear) -> None:
        size = (plain.in_features, plain.out_features, plain.bias is not None)
        super().__init__(*size, has_fp16_weights=False, device="meta")
        self.weight = Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        self.weight.CB = None  # a second name of the same bits, which copies would hold twice
        self.bias = plain.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        # bitsandbytes' own int8_vectorwise_dequant has no place to write to, and takes twice the memory and time
        found: Tensor = self.weight.data.float().mul_(self.weight.SCB.view(-1, 1) / 127)
        return found.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8":
        scales = self.weight.SCB
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight.SCB = scales.to(self.weight.device)  # it goes along to other devices, and stays in float32
        return self


class Nf4(Quantized, LinearNF4):  # type: ignore[misc]
    """Blocks of 64 weights, each to one of 16 quantiles of a normal distribution times the block's scale.

    The scales are in 8 bits themselves (Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        self.bias = plain.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return found.to(dtype)


KINDS: dict[str, Callable[[nn.Linear], Quantized]] = {"int8": Int8, "nf4": Nf4}
