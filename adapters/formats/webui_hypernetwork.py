"""Hypernetworks of stable-diffusion-webui: ``<width>.<0 for keys, 1 for values>.linear.<i>.weight`` and ``.bias``.

They are ``.pt`` files, `{width: (keys, values), "layer_structure": …}`, which `reader` flattens; further entries
describe how the network is built.
Source: AUTOMATIC1111/stable-diffusion-webui v1.10.1, ``modules/hypernetworks/hypernetwork.py``.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import parse_json
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.registry import read_network

_KEY = re.compile(r"(?P<width>\d+)\.(?P<side>[01])\.linear(?:\.(?P<place>\d+)|(?P<old>[12]))\.(?P<leaf>weight|bias)")
"""Key of a weight or bias; the oldest files have ``linear1`` and ``linear2`` for ``linear.0`` and ``linear.1``"""

_OPTIMIZER = "optimizer_state_dict."
"""Beginning of the keys of an optimizer's state, which webui used to save in the same file for resuming"""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key is a hypernetwork's weight or bias."""
    return any(_KEY.fullmatch(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter; keys of an optimizer's state are ignored. Raises ValueError for other unknown keys."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnknownKeyError(key, "<width>.<0 or 1>.linear.<i>.weight or .bias of a hypernetwork")
        place = int(match["place"]) if match["place"] else int(match["old"]) - 1
        renamed[f"{match['width']}-{'kv'[int(match['side'])]}.linear.{place}.{match['leaf']}"] = value
    metadata = {"method": "hypernetwork"} | ({"name": _value(header, "name", "")} if "name" in header else {})
    return Adapter({}, metadata, (read_network("hypernetwork", renamed, _settings(header)),))


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header, from which `nested_contents` builds the contents of webui's file.

    Raises:
        ValueError: the adapter is not a single hypernetwork, or ComfyUI would build it differently.
    """
    if adapter.deltas or adapter.tokens or len(adapter.networks) != 1 or adapter.networks[0].kind != "hypernetwork":
        raise ValueError("it is not a single hypernetwork")
    network = adapter.networks[0]
    tensors: dict[str, Tensor] = {}
    for key, value in network.tensors.items():
        start, _, rest = key.partition(".")
        width, _, side = start.partition("-")
        tensors[f"{width}.{'kv'.index(side)}.{rest}"] = value.contiguous()
    settings = network.settings
    if settings["layer_norm"] and not settings["activate_output"] and settings["activation"] != "linear":
        raise ValueError(
            "it is a hypernetwork with layer norms and no activation after its last layer, where ComfyUI adds one"
        )
    dropout = list(settings.get("dropout") or [])
    entries = {
        "step": int(adapter.metadata.get("steps") or 0),
        "name": str(adapter.metadata.get("name") or adapter.metadata.get("trigger") or "diffgraft"),
        "layer_structure": list(settings["structure"]),
        "activation_func": settings["activation"],
        "is_layer_norm": settings["layer_norm"],
        "weight_initialization": settings["start"],
        "activate_output": settings["activate_output"],
        "use_dropout": any(dropout),
        "dropout_structure": dropout or None,
        "last_layer_dropout": bool(dropout and dropout[-2]),
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "optional_info": None,
    }
    header: dict[str, str] = {}
    for key, value in entries.items():
        is_list = isinstance(value, list)
        items = {f"{key}.{place}": item for place, item in enumerate(value)} if is_list else {key: value}
        header |= {name: json.dumps(item) for name, item in items.items()}
    return tensors, header


def nested_contents(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[Any, Any]:
    """Contents of webui's file, for `torch.save`: ``{width: (keys, values), "layer_structure": [1, 2, 1], …}``."""
    contents: dict[Any, Any] = {}
    for key, value in tensors.items():
        width, side, rest = key.split(".", 2)
        contents.setdefault(int(width), ({}, {}))[int(side)][rest] = value
    for key in header:
        name, is_list_item, _ = key.partition(".")
        if is_list_item:
            contents.setdefault(name, []).append(parse_json(header, key))
        else:
            contents[name] = parse_json(header, key)
    return contents


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the network, under the names of this project; missing entries get webui's defaults."""
    structure = _list(header, "layer_structure") or [1, 2, 1]
    dropout = _list(header, "dropout_structure")
    if not dropout and _value(header, "use_dropout", False):
        last = 0.3 if _value(header, "last_layer_dropout", True) else 0
        dropout = [0, *[0.3] * (len(structure) - 3), last, 0]
    return {
        "structure": structure,
        "activation": _value(header, "activation_func", "linear") or "linear",
        "activate_output": _value(header, "activate_output", True),
        "layer_norm": _value(header, "is_layer_norm", False),
        "dropout": dropout,
        "start": _value(header, "weight_initialization", "Normal") or "Normal",
    }


def _value(header: Mapping[str, str], key: str, default: Any) -> Any:
    return parse_json(header, key) if key in header else default


def _list(header: Mapping[str, str], key: str) -> list[Any]:
    """Restore a list that was flattened to ``key.0``, ``key.1`` and so on."""
    return [parse_json(header, f"{key}.{place}") for place in range(len(header)) if f"{key}.{place}" in header]


DIALECT = Dialect(
    name="webui-hypernetwork",
    summary="webui's hypernetworks",
    order=70,
    recognises=recognises,
    read=read,
    keeps_metadata=False,
)
