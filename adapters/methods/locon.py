"""LoCon: LoRA on the convolutions as well (LyCORIS, Yeh et al. 2023, arXiv:2309.14859, section 3.1).

A k × k convolution down to the rank is followed by a 1 × 1 convolution up; or, in the Tucker variant, a 1 × 1 down, a
k × k core between r channels, and a 1 × 1 up.
"""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from diffgraft.adapters.factors import attach_factors
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.methods.lora import LoraOptions, lora_layer
from diffgraft.adapters.patch import AdapterLayer


class LoconOptions(LoraOptions):
    """Options of LoCon beside rank and alpha."""

    conv_rank: int | None = Field(None, ge=1)
    """Rank of convolutions with kernels larger than 1 × 1; unset: the same rank as other layers"""
    conv_alpha: float | None = Field(None, gt=0)
    """Alpha of convolutions with kernels larger than 1 × 1; unset: the same scale as other layers"""
    tucker: bool = False
    """Tucker decomposition: a small k × k core between two 1 × 1 factors"""


def attach(target: Any, spec: Spec) -> Attached:
    options: LoconOptions = spec.options
    conv_rank = options.conv_rank or spec.rank
    conv_alpha = options.conv_alpha or spec.alpha / spec.rank * conv_rank

    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            tucker = options.tucker
            return lora_layer(path, layer, generator, spec, rank=conv_rank, alpha=conv_alpha, tucker=tucker)
        return lora_layer(path, layer, generator, spec, rank=spec.rank, alpha=spec.alpha)

    return attach_factors(target, spec, make)


METHOD = Method(
    name="locon",
    summary="LoRA on convolutions too: for textures and styles",
    attach=attach,
    options=LoconOptions,
    layers="all",
)
