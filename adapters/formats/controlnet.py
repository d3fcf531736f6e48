"""ControlNets of diffusers: a folder with ``config.json`` and weights, or a single file with the same names of weights.

Single files have the configuration in their header, as ``controlnet_config``. diffusers opens the folder by
``ControlNetModel.from_pretrained``, and the file by ``ControlNetModel.from_single_file(file, config=FOLDER)``.
Source: diffusers 0.42.1, ``models/controlnets/controlnet.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Contents, Dialect, store_safetensors
from diffgraft.adapters.formats.header import read_json, read_metadata, write_metadata
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.registry import read_network
from diffgraft.files import atomic_folder, write_safetensors, write_text

KIND = "controlnet"
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
_CONFIG_KEY = "controlnet_config"
"""Header key of single files with the configuration, as JSON"""
_MARK = "controlnet_cond_embedding.conv_in.weight"
_ORIGINAL = ("input_hint_block.0.weight", "control_model.input_hint_block.0.weight")
"""Names of the same weight in the layout of the authors' files"""
_LARGEST_CONFIG = 2**20


def open_folder(path: Path) -> Contents | None:
    """Read tensors and configuration of a folder written by diffusers; None if `path` is not such a folder."""
    config, weights = path / CONFIG, path / WEIGHTS
    if not config.is_file() or not weights.is_file() or config.stat().st_size > _LARGEST_CONFIG:
        return None
    tensors, header = open_file(weights)
    return tensors, {**header, _CONFIG_KEY: config.read_text("utf-8", errors="replace")}


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the tensors are those of a ControlNet."""
    return any(key in tensors for key in (_MARK, *_ORIGINAL))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError if the configuration is missing, or the layout is the authors'."""
    if _MARK not in tensors:
        raise ValueError(
            "it is a ControlNet in the layout of its authors' files: convert it by diffusers, with "
            "ControlNetModel.from_single_file(FILE).save_pretrained(FOLDER), and give that folder"
        )
    settings = read_json(header, _CONFIG_KEY)
    if not settings:
        raise ValueError(f"it is a ControlNet without its {CONFIG}: give the folder that holds both files")
    metadata = read_metadata({key: value for key, value in header.items() if key != _CONFIG_KEY}, method=KIND)
    return Adapter({}, metadata, (read_network(KIND, tensors, settings),))


def write(adapter: Adapter) -> Contents:
    """Return tensors and header. Raises ValueError for anything but a single ControlNet."""
    kinds = [network.kind for network in adapter.networks]
    if adapter.deltas or adapter.tokens or kinds != [KIND]:
        raise ValueError("such files hold one ControlNet and nothing else")
    (network,) = adapter.networks
    config = json.dumps(dict(network.settings), indent=2, sort_keys=True)
    return dict(network.tensors), {"format": "pt", **write_metadata(adapter), _CONFIG_KEY: config}


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write a single file if `path` ends in .safetensors, and else a folder, atomically.

    Raises:
        ValueError: `path` has another suffix, or exists and is not to be replaced.
    """
    if path.suffix == ".safetensors":
        return store_safetensors(path, tensors, header)
    if path.suffix or path.exists():
        raise ValueError(f"give the name of a new folder, or of a .safetensors file, instead of {path}")
    common = {key: value for key, value in header.items() if key != _CONFIG_KEY}
    with atomic_folder(path, sum(value.nbytes for value in tensors.values())) as partial:
        write_safetensors(partial / WEIGHTS, tensors, common)
        write_text(partial / CONFIG, f"{header[_CONFIG_KEY]}\n")
    return path


DIALECT = Dialect(
    name="controlnet",
    summary="diffusers' ControlNets, as a folder or a single file",
    order=15,
    recognises=recognises,
    read=read,
    write=write,
    store=store,
    open=open_folder,
    auto=35,
    holds_networks=True,
)
