"""A pipeline's weights under the names of the original Stable Diffusion checkpoints.

Written from the layout's own definition (the `ldm` module tree), to hold the loader of single files to it.
"""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _unet(name: str, config: Any) -> str:
    per_level = config.layers_per_block + 1
    head = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    for ours, theirs in head.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    place, kind, number, rest = "", "", 0, ""
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, number, rest = found[1], int(found[2]), found[3]
        place = f"middle_block.{2 * number if kind == 'resnets' else 1}"
    elif found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        level, kind, number, rest = int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{per_level * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            second = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
            return f"output_blocks.{per_level * level + per_level - 1}.{second}.{rest}"
        index = per_level * level + number + (1 if found[1] == "down" else 0)
        place = f"{'input' if found[1] == 'down' else 'output'}_blocks.{index}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        head_name, _, tail = rest.partition(".")
        rest = f"{_RESNET[head_name]}.{tail}"
    return f"{place}.{rest}"


def _vae(name: str, levels: int) -> str:
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def write_original(pipe: Any, path: Path) -> None:
    """Write UNet, VAE and text encoder of a Stable Diffusion 1.x pipeline as one original-layout file."""
    out: dict[str, Tensor] = {}
    for name, value in pipe.unet.state_dict().items():
        out["model.diffusion_model." + _unet(name, pipe.unet.config)] = value.contiguous()
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        theirs = _vae(name, levels)
        if "attn_1" in theirs and "norm" not in theirs and value.ndim == 2:
            value = value[:, :, None, None]
        out["first_stage_model." + theirs] = value.contiguous()
    for name, value in pipe.text_encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        out["cond_stage_model.transformer.text_model." + plain] = value.contiguous()
    save_file(out, path)
