"""Smaller copies of UNets, which begin with the weights of the original that they keep."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.errors import DiffgraftError

_UP_LAYER = re.compile(r"(up_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)(\..+)")


@dataclass(frozen=True)
class StudentSize:
    """Size of a smaller denoiser, relative to the base's."""

    width: float = 1.0
    """Share of the base's widths"""
    layers: int | None = None
    """Layers in a block; None: as many as the base has"""
    middle: bool = True
    """Whether it has the base's middle block"""


def student_unet(unet: Any, size: StudentSize) -> nn.Module:
    """Build a smaller ``UNet2DConditionModel``, in float32 on the CPU, or on ``meta`` if `unet` is there.

    Layers that are left out of an upward block are the middle ones, as in BK-SDM (Kim et al. 2023, arXiv:2305.15798,
    figure 3). Narrower weights are the first rows and columns of the original ones.

    Raises:
        DiffgraftError: the student would have more layers than the UNet, or would be the UNet itself.
    """
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    depth = config["layers_per_block"]
    if not isinstance(depth, int):
        raise DiffgraftError("Students are made of bases whose blocks have equally many layers, and this one's do not.")
    layers = size.layers or depth
    if layers > depth:
        raise DiffgraftError(f"A student with {layers} layers in a block is larger than the base, which has {depth}.")
    if layers == depth and size.width == 1 and size.middle:
        raise DiffgraftError(
            "A student of the base's own size saves nothing: set options.middle=false, options.layers or options.width."
        )
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    heads = heads if isinstance(heads, list | tuple) else [heads] * len(config["block_out_channels"])
    groups = config["norm_num_groups"] or 1
    widths = [
        max(1, round(size.width * width / math.lcm(groups, count))) * math.lcm(groups, count)
        for width, count in zip(config["block_out_channels"], heads, strict=True)
    ]
    config |= {"block_out_channels": widths, "layers_per_block": layers}
    config |= {} if size.middle else {"mid_block_type": None}
    device = unet.device if unet.device.type == "meta" else "cpu"
    with torch.device(device):
        student: nn.Module = type(unet).from_config(config)
    if device == "cpu":
        _inherit(student, unet, layers, depth)
    return student.float()


@torch.no_grad()
def _inherit(student: nn.Module, unet: nn.Module, layers: int, depth: int) -> None:
    """Copy the weights that both have; upward blocks have one layer more than the others."""
    theirs = dict(unet.named_parameters())
    for name, value in student.named_parameters():
        found = _UP_LAYER.fullmatch(name)
        if found and int(found[2]) == layers:
            name = f"{found[1]}{depth}{found[3]}"
        value.copy_(_first(theirs[name], value))


def _first(source: Tensor, like: Tensor) -> Tensor:
    """Return the first rows and columns of a weight, as many as `like` has."""
    return source[tuple(slice(0, length) for length in like.shape)]
