"""Linear layers whose weights stay in float8, as ComfyUI's checkpoints have them, and are scaled as they compute."""

import math

import torch
from torch import Tensor, nn

from diffgraft.bases.quantized import Quantized

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_SMALLEST = 1e-30
"""Largest magnitude of a weight that is all zeros"""


class Float8(Quantized):
    """A linear layer with 8 bits per weight: a number of float8 (e4m3) times the scale of the layer.

    The weights of a checkpoint in float8 keep their numbers, whether they are scaled or not.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        numbers, self.scale = _nearest(plain.weight.data.float())
        # as bytes, since numbers in a float8 dtype would be cast with the other weights of a network
        self.weight = nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
        self.bias = plain.bias

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight: Tensor = self.weight.data.view(_FLOAT8)
        return weight.to(dtype).mul_(self.scale)

    def move_scales(self, device: torch.device) -> None:
        """Do nothing: the scale is a number, on no device."""


def _nearest(weight: Tensor) -> tuple[Tensor, float]:
    """Return numbers in float8 and the scale by which they are nearest to a weight [out, in] in float32.

    By the scale of files that are scaled, the largest magnitude is the largest number of float8. By a power of two,
    numbers that are not scaled stay the same. The one that is nearer is then fitted, as half precision rounds products.
    """
    exact = max(float(weight.abs().max()), _SMALLEST) / _LARGEST
    power = 2.0 ** math.ceil(math.log2(exact))
    found = {scale: (weight / scale).to(_FLOAT8) for scale in (exact, power)}
    off = {scale: float((numbers.float() * scale - weight).square().sum()) for scale, numbers in found.items()}
    scale = min(off, key=lambda scale: off[scale])
    numbers = found[scale].float()
    size = float(numbers.square().sum())
    return found[scale], float((numbers * weight).sum()) / size if size else scale
