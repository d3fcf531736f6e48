"""Stability AI's Control-LoRAs, as ComfyUI reads them: ``<module>.up``, ``<module>.down``, and whole weights.

Modules have the original names of a ControlNet. An empty tensor, ``lora_controlnet``, marks the files.
Sources: Stability-AI/stability-ComfyUI-nodes, ``control_lora_create.py``; ComfyUI, ``comfy/controlnet.py``
(``ControlLora``); lllyasviel/ControlNet, ``cldm/cldm.py``.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Contents, Dialect
from diffgraft.adapters.formats.families import usual_layers
from diffgraft.adapters.formats.header import read_metadata, write_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.registry import read_network
from diffgraft.bases.ldm_keys import MAX_LEVELS, BlockLayout

KIND = "control-lora"
_MARK = "lora_controlnet"
_READER, _OUTPUTS, _MIDDLE = "controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block."
_THEIR_READER = re.compile(r"input_hint_block\.(\d+)\.(\w+)")
_THEIR_OUTPUT = re.compile(r"zero_convs\.(\d+)\.0\.(\w+)")
_THEIR_MIDDLE = "middle_block_out.0."


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the file is marked as a Control-LoRA."""
    return _MARK in tensors


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Build the adapter; without `layers`, those of the header count, and else 2. Raises ValueError for other keys."""
    metadata = read_metadata(header, method=KIND)
    blocks = BlockLayout(layers or usual_layers(metadata), (True,) * MAX_LEVELS)
    keys = [key for key in tensors if key != _MARK]
    last = max((int(found[1]) for key in keys if (found := _THEIR_READER.fullmatch(key))), default=0)
    renamed = {_ours(key, last, blocks): tensors[key] for key in keys}
    return Adapter({}, metadata, (read_network(KIND, renamed, {}),))


def _ours(key: str, last: int, blocks: BlockLayout) -> str:
    """Return diffusers' name for a key; `last` is the number of the last layer that reads the picture."""
    if found := _THEIR_READER.fullmatch(key):
        number = int(found[1])
        layer = "conv_in" if number == 0 else "conv_out" if number == last else f"blocks.{number // 2 - 1}"
        return f"{_READER}{layer}.{found[2]}"
    if found := _THEIR_OUTPUT.fullmatch(key):
        return f"{_OUTPUTS}{found[1]}.{found[2]}"
    if key.startswith(_THEIR_MIDDLE):
        return f"{_MIDDLE}{key.removeprefix(_THEIR_MIDDLE)}"
    path, _, leaf = key.rpartition(".")
    try:
        return f"{blocks.to_diffusers(path)}.{leaf}"
    except ValueError as error:
        raise UnknownKeyError(key, "<module of a ControlNet>.up, .down, .weight or .bias of a Control-LoRA") from error


def write(adapter: Adapter) -> Contents:
    """Return tensors and header. Raises ValueError for anything but a single Control-LoRA."""
    if adapter.deltas or adapter.tokens or [network.kind for network in adapter.networks] != [KIND]:
        raise ValueError("such files hold one Control-LoRA and nothing else")
    blocks = BlockLayout(usual_layers(adapter.metadata), (True,) * MAX_LEVELS)
    tensors = adapter.networks[0].tensors
    inner = sum(name.startswith(f"{_READER}blocks.") and name.endswith(".weight") for name in tensors)
    written = {_theirs(name, 2 * (inner + 1), blocks): value for name, value in tensors.items()}
    return {**written, _MARK: torch.zeros(0)}, {"format": "pt", **write_metadata(adapter)}


def _theirs(name: str, last: int, blocks: BlockLayout) -> str:
    """Return the key for diffusers' name; `last` is the number of the last layer that reads the picture."""
    if name.startswith(_READER):
        layer, _, leaf = name.removeprefix(_READER).rpartition(".")
        number = {"conv_in": 0, "conv_out": last}.get(layer)
        if number is None:
            number = 2 * (int(layer.removeprefix("blocks.")) + 1)
        return f"input_hint_block.{number}.{leaf}"
    if name.startswith(_OUTPUTS):
        number_, leaf = name.removeprefix(_OUTPUTS).split(".")
        return f"zero_convs.{number_}.0.{leaf}"
    if name.startswith(_MIDDLE):
        return f"{_THEIR_MIDDLE}{name.removeprefix(_MIDDLE)}"
    path, _, leaf = name.rpartition(".")
    return f"{blocks.to_ldm(path)}.{leaf}"


DIALECT = Dialect(
    name="control-lora",
    summary="Stability AI's Control-LoRAs, as ComfyUI reads them",
    order=14,
    recognises=recognises,
    read=read,
    write=write,
    auto=37,
    holds_networks=True,
)
