"""Hypernetworks of stable-diffusion-webui: ``<width>.<0 for keys, 1 for values>.linear.<i>.weight`` and ``.bias``.

They are ``.pt`` files, `{width: (keys, values), "layer_structure": …}` before `reader` lays them flat; how the network
is built stands beside it under the names below.
Source: AUTOMATIC1111/stable-diffusion-webui v1.10.1, ``modules/hypernetworks/hypernetwork.py``.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import parsed
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.registry import read_network

_KEY = re.compile(r"(?P<width>\d+)\.(?P<side>[01])\.linear(?:\.(?P<place>\d+)|(?P<old>[12]))\.(?P<leaf>weight|bias)")
"""The oldest files say ``linear1`` and ``linear2`` for what later became ``linear.0`` and ``linear.1``."""

_OPTIMIZER = "optimizer_state_dict."
"""What the names of an optimiser's state begin with, which webui once saved in the same file to go on training"""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_KEY.fullmatch(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key but those of an optimiser's state is used, or named in a ValueError."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            continue
        found = _KEY.fullmatch(key)
        if found is None:
            raise UnknownKeyError(key, "<width>.<0 or 1>.linear.<i>.weight or .bias of a hypernetwork")
        place = int(found["place"]) if found["place"] else int(found["old"]) - 1
        renamed[f"{found['width']}-{'kv'[int(found['side'])]}.linear.{place}.{found['leaf']}"] = value
    said = {"method": "hypernetwork"} | ({"name": _said(header, "name", "")} if "name" in header else {})
    return Adapter({}, said, (read_network("hypernetwork", renamed, _settings(header)),))


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header, which `nested` makes webui's file of.

    Raises:
        ValueError: there is more than one network, something else with it, or ComfyUI would build it in another way.
    """
    if adapter.deltas or adapter.tokens or len(adapter.networks) != 1 or adapter.networks[0].kind != "hypernetwork":
        raise ValueError("it is no single hypernetwork")
    network = adapter.networks[0]
    tensors: dict[str, Tensor] = {}
    for key, value in network.tensors.items():
        start, _, rest = key.partition(".")
        width, _, side = start.partition("-")
        tensors[f"{width}.{'kv'.index(side)}.{rest}"] = value.contiguous()
    said = network.settings
    if said["layer_norm"] and not said["activate_output"] and said["activation"] != "linear":
        raise ValueError(
            "it is a hypernetwork with layer norms and no activation behind its last layer, where ComfyUI puts one"
        )
    dropout = list(said.get("dropout") or [])
    entries = {
        "step": int(adapter.metadata.get("steps") or 0),
        "name": str(adapter.metadata.get("name") or adapter.metadata.get("trigger") or "diffgraft"),
        "layer_structure": list(said["structure"]),
        "activation_func": said["activation"],
        "is_layer_norm": said["layer_norm"],
        "weight_initialization": said["start"],
        "activate_output": said["activate_output"],
        "use_dropout": any(dropout),
        "dropout_structure": dropout or None,
        "last_layer_dropout": bool(dropout and dropout[-2]),
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "optional_info": None,
    }
    header: dict[str, str] = {}
    for key, value in entries.items():
        listed = {f"{key}.{place}": one for place, one in enumerate(value)} if isinstance(value, list) else {key: value}
        header |= {name: json.dumps(one) for name, one in listed.items()}
    return tensors, header


def nested(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[Any, Any]:
    """What `torch.save` makes webui's file of: ``{width: (keys, values), "layer_structure": [1, 2, 1], …}``."""
    held: dict[Any, Any] = {}
    for key, value in tensors.items():
        width, side, rest = key.split(".", 2)
        held.setdefault(int(width), ({}, {}))[int(side)][rest] = value
    for key in header:
        name, is_listed, _ = key.partition(".")
        if is_listed:
            held.setdefault(name, []).append(parsed(header, key))
        else:
            held[name] = parsed(header, key)
    return held


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """How the network is built, in our words; what a file leaves out is as webui takes it then."""
    structure = _listed(header, "layer_structure") or [1, 2, 1]
    dropout = _listed(header, "dropout_structure")
    if not dropout and _said(header, "use_dropout", False):
        last = 0.3 if _said(header, "last_layer_dropout", True) else 0
        dropout = [0, *[0.3] * (len(structure) - 3), last, 0]
    return {
        "structure": structure,
        "activation": _said(header, "activation_func", "linear") or "linear",
        "activate_output": _said(header, "activate_output", True),
        "layer_norm": _said(header, "is_layer_norm", False),
        "dropout": dropout,
        "start": _said(header, "weight_initialization", "Normal") or "Normal",
    }


def _said(header: Mapping[str, str], key: str, default: Any) -> Any:
    return parsed(header, key) if key in header else default


def _listed(header: Mapping[str, str], key: str) -> list[Any]:
    """A list that was laid flat into ``key.0``, ``key.1`` and so on."""
    return [parsed(header, f"{key}.{place}") for place in range(len(header)) if f"{key}.{place}" in header]


DIALECT = Dialect(
    name="webui-hypernetwork",
    summary="webui's hypernetworks",
    order=70,
    recognises=recognises,
    read=read,
    keeps_metadata=False,
)
