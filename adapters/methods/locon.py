"""LoCon: LoRA on the convolutions as well (LyCORIS, Yeh et al. 2023, arXiv:2309.14859, section 3.1).

A k × k convolution down to the rank and a 1 × 1 up; or, in the Tucker variant, 1 × 1 down, a k × k kernel between r
channels, and 1 × 1 up.
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
    """What there is to set on LoCon."""

    conv_rank: int | None = Field(None, ge=1)
    """Rank of convolutions whose kernel is larger than 1 × 1; unset: as everywhere"""
    conv_alpha: float | None = Field(None, gt=0)
    """Alpha of those; unset: the same scale as everywhere"""
    tucker: bool = False
    """A small k × k kernel between two 1 × 1 factors"""


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
    summary="LoRA on convolutions too: textures and styles",
    attach=attach,
    options=LoconOptions,
    layers="all",
)
