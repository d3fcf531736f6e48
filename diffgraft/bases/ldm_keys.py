"""The original layout of Stable Diffusion: names of weights in CompVis' ldm and Stability's sgm.

Single-file checkpoints have these names, and so do adapter files of kohya's tools for Stable Diffusion XL. Most of this
module only maps names; `ldm_state_dict` also reshapes the few tensors that differ (OpenCLIP's text encoder, attention
of the VAE).
Sources: CompVis/latent-diffusion, ``ldm/modules/diffusionmodules/openaimodel.py`` and ``model.py``; Stability-AI/
generative-models, ``sgm/modules/encoders/modules.py``; mlfoundations/open_clip, ``src/open_clip/transformer.py``.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffgraft.bases.base import Base
from diffgraft.errors import DiffgraftError

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
"""Prefixes of the names of their weights in single files"""

MAX_LEVELS = 6
"""Number of levels of a UNet for which names are recognised at most; real UNets have three or four"""
LDM_PREFIXES = ("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "label_emb.", "out.")
"""Prefixes of paths inside the original UNet"""

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Modules of the UNet outside its blocks: diffusers' name → original name"""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS_BACK = {theirs: ours for ours, theirs in _ENDS.items()}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}
_OURS = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>\w+)\.(?P<number>\d+)(?P<rest>\..+|$)")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<number>\d+)(?P<rest>\..+|$)")
_THEIRS = re.compile(r"(?P<side>input|output)_blocks\.(?P<place>\d+)\.(?P<slot>\d+)(?P<rest>\..+|$)")
_THEIR_MIDDLE = re.compile(r"middle_block\.(?P<slot>[012])(?P<rest>\..+|$)")


@dataclass(frozen=True)
class BlockLayout:
    """Mapping of names between diffusers, which numbers blocks by level, and the original, which numbers all blocks."""

    layers: int
    """ResNets in a down block (`layers_per_block`); up blocks have one more"""
    attention: tuple[bool, ...]
    """Whether each down block has attentions, from the first to the last"""

    @classmethod
    def from_config(cls, config: Any) -> "BlockLayout":
        """Return the layout of a ``UNet2DConditionModel`` with this configuration."""
        return cls(config.layers_per_block, tuple("CrossAttn" in kind for kind in config.down_block_types))

    def to_ldm(self, path: str) -> str:
        """Convert the path of a module or parameter from diffusers' UNet to the original layout.

        Raises:
            ValueError: no UNet has such a path.
        """
        if end := _moved(path, _ENDS):
            return end
        if found := _MIDDLE.fullmatch(path):
            slot = 2 * int(found["number"]) if found["kind"] == "resnets" else 1
            return f"middle_block.{slot}{_inner(found['kind'], found['rest'])}"
        if found := _OURS.fullmatch(path):
            side, kind, number = found["side"], found["kind"], int(found["number"])
            first = int(found["level"]) * (self.layers + 1) + (1 if side == "down" else 0)
            if kind == "downsamplers" and side == "down" and _under(found["rest"], ".conv"):
                return f"input_blocks.{first + self.layers}.0.op{found['rest'].removeprefix('.conv')}"
            if kind == "upsamplers" and side == "up" and int(found["level"]) < len(self.attention):
                attended = self.attention[-1 - int(found["level"])]
                return f"output_blocks.{first + self.layers}.{2 if attended else 1}{found['rest']}"
            if kind in ("resnets", "attentions"):
                slot = 0 if kind == "resnets" else 1
                blocks = "input_blocks" if side == "down" else "output_blocks"
                return f"{blocks}.{first + number}.{slot}{_inner(kind, found['rest'])}"
        raise ValueError(f"{path} is not a path in a UNet of diffusers")

    def to_diffusers(self, path: str) -> str:
        """Convert the path of a module or parameter from the original UNet to diffusers' layout: inverse of `to_ldm`.

        Raises:
            ValueError: no UNet of the original layout has such a path.
        """
        if end := _moved(path, _ENDS_BACK):
            return end
        if found := _THEIR_MIDDLE.fullmatch(path):
            slot = int(found["slot"])
            kind = "attentions" if slot == 1 else "resnets"
            return f"mid_block.{kind}.{slot // 2}{_outer(kind, found['rest'])}"
        if found := _THEIRS.fullmatch(path):
            place, slot, rest = int(found["place"]), int(found["slot"]), found["rest"]
            if found["side"] == "input":
                level, number = divmod(place - 1, self.layers + 1)
                if number == self.layers and slot == 0 and _under(rest, ".op"):
                    return f"down_blocks.{level}.downsamplers.0.conv{rest.removeprefix('.op')}"
                side = "down"
            else:
                level, number = divmod(place, self.layers + 1)
                if number == self.layers and slot > 0 and _under(rest, ".conv"):
                    return f"up_blocks.{level}.upsamplers.0{rest}"
                side = "up"
            if slot < 2 and 0 <= level < len(self.attention) and number <= self.layers - (side == "down"):
                kind = "attentions" if slot else "resnets"
                return f"{side}_blocks.{level}.{kind}.{number}{_outer(kind, rest)}"
        raise ValueError(f"{path} is not a path in a UNet of the original layout")


def layers_per_block_of(target: Any) -> int | None:
    """Return ``layers_per_block`` of a UNet, base or pipeline; None if blocks differ or there is no UNet."""
    config = getattr(getattr(target, "unet", target), "config", None)
    layers = getattr(config, "layers_per_block", None)
    return layers if isinstance(layers, int) else None


def _under(rest: str, start: str) -> bool:
    return rest == start or rest.startswith(f"{start}.")


def _moved(path: str, names: Mapping[str, str]) -> str | None:
    """Return `path` with its first part renamed by `names`; None if none of them matches."""
    return next((new + path.removeprefix(old) for old, new in names.items() if _under(path, old)), None)


def _inner(kind: str, rest: str) -> str:
    """Convert the rest of a path inside a block, with its leading dot, to the original names."""
    return rest if kind == "attentions" or not rest else f".{_renamed(rest[1:], _RESNET)}"


def _outer(kind: str, rest: str) -> str:
    """Convert the rest of a path inside a block, with its leading dot, to diffusers' names."""
    return rest if kind == "attentions" or not rest else f".{_renamed(rest[1:], _RESNET_BACK)}"


def _renamed(path: str, names: Mapping[str, str]) -> str:
    moved = _moved(path, names)
    if moved is None:
        raise ValueError(f"{path} is not a part of a ResNet")
    return moved


def ldm_vae_key(path: str, levels: int) -> str:
    """Convert a path from diffusers' VAE to the original one, which numbers its up blocks from the last."""

    def up(found: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(found[1])}."

    for ours, theirs in (
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ):
        path = re.sub(ours, theirs, path)
    return re.sub(r"up_blocks\.(\d+)\.", up, path).replace("upsamplers.0", "upsample").replace(".resnets.", ".block.")


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def is_open_clip(prefix: str) -> bool:
    """Whether a text encoder with this prefix in single files is OpenCLIP's; CLIP has transformers' names."""
    return not prefix.endswith("text_model.")


def open_clip_state_dict(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a CLIP text encoder's weights under OpenCLIP's names.

    Query, key and value are concatenated, and the text projection is transposed.
    """
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            yield "text_projection", value.T.contiguous()
        elif name in _OPEN_CLIP_ENDS:
            yield _OPEN_CLIP_ENDS[name], value
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            joined.setdefault(f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}", {})[found[2]] = value
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            yield f"transformer.resblocks.{found[1]}.{_OPEN_CLIP[found[2]]}.{found[3]}", value
        else:
            raise ValueError(f"{name} is not a weight of a CLIP text encoder")
    for name, thirds in joined.items():
        yield name, torch.cat([thirds[letter] for letter in "qkv"])


def clip_names_from_open_clip(name: str) -> list[tuple[str, int | None, bool]]:
    """Return transformers' names for a weight of OpenCLIP's text encoder.

    Returns:
        For each name: the name, the third of the rows that it stands for (None: all), and whether it is transposed.
        Empty for weights that transformers does not have, such as the logit scale.
    """
    if name == "text_projection":
        return [("text_projection.weight", None, True)]
    ends = {theirs: ours for ours, theirs in _OPEN_CLIP_ENDS.items()}
    if name in ends:
        return [(ends[name], None, False)]
    if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
        start = f"encoder.layers.{found[1]}.self_attn"
        return [(f"{start}.{letter}_proj.{found[2]}", third, False) for third, letter in enumerate("qkv")]
    if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name):
        inner = {theirs: ours for ours, theirs in _OPEN_CLIP.items()}
        if found[2] in inner:
            return [(f"encoder.layers.{found[1]}.{inner[found[2]]}.{found[3]}", None, False)]
    return []


def ldm_state_dict(base: Base) -> dict[str, Tensor]:
    """Return all weights of a base under the names of single-file checkpoints; tensors share memory where possible.

    Raises:
        DiffgraftError: its family has no single-file layout, or its UNet's blocks differ in depth.
    """
    if not base.family.single_file_prefixes:
        raise DiffgraftError(f"The family {base.family.name} has no single-file layout: write a folder instead.")
    if not isinstance(base.unet.config.layers_per_block, int):
        raise DiffgraftError(
            f"{base.name} has blocks of different depth, which single files do not support: write a folder, under a "
            "name without .safetensors."
        )
    blocks, levels = BlockLayout.from_config(base.unet.config), len(base.vae.config.block_out_channels)
    weights = {f"{UNET_PREFIX}{blocks.to_ldm(name)}": value for name, value in base.unet.state_dict().items()}
    for name, value in base.vae.state_dict().items():
        theirs = ldm_vae_key(name, levels)
        is_matrix = ".attn_1." in theirs and value.ndim == 2  # a 1 x 1 convolution in the original
        weights[f"{VAE_PREFIX}{theirs}"] = value[:, :, None, None] if is_matrix else value
    for part, start in base.family.single_file_prefixes.items():
        state = {name.removeprefix("text_model."): value for name, value in getattr(base, part).state_dict().items()}
        named = open_clip_state_dict(state) if is_open_clip(start) else state.items()
        weights |= {f"{start}{name}": value for name, value in named}
    return weights
