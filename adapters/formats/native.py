"""This project's own layout, which holds any method: ``<path>.<n>.<leaf>``, one n for each delta of a module, in order.

The header key ``diffgraft_deltas`` holds JSON: path → a list of {"kind", "alpha"}, one for each n. ``kind`` is the name
of the method that reads the leaves, ours or one from an outside package. The header key ``diffgraft`` is as everywhere.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.header import OURS, number, read_json, write_ours
from diffgraft.adapters.method import get_method

_DELTAS = "diffgraft_deltas"


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the header has this dialect's key."""
    return _DELTAS in header


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Every key is used, or named in a ValueError."""
    left = dict(tensors)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, listed in read_json(header, _DELTAS).items():
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise ValueError(f"its header says {listed!r} of {path}, which is no list of deltas")
        built = []
        for place, said in enumerate(listed):
            start = f"{path}.{place}."
            leaves = {key.removeprefix(start): left.pop(key) for key in list(left) if key.startswith(start)}
            method = get_method(str(said.get("kind")))
            if method.read is None:
                raise ValueError(f"the method {method.name} of {path} has no deltas")
            alpha = said.get("alpha")
            try:
                built.append(method.read(leaves, None if alpha is None else number(alpha)))
            except (ValueError, LookupError) as error:
                raise ValueError(f"the leaves of {path} do not fit together: {error}") from error
        deltas[path] = tuple(built)
    if left:
        raise ValueError(f"its key {next(iter(left))} belongs to nothing that the header lists")
    return Adapter(deltas, read_json(header, OURS))


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for path, deltas in adapter.deltas.items():
        said[path] = [{"kind": delta.kind, "alpha": delta.alpha} for delta in deltas]
        for place, delta in enumerate(deltas):
            tensors |= {f"{path}.{place}.{name}": leaf.contiguous() for name, leaf in delta.leaves.items()}
    return tensors, {"format": "pt", _DELTAS: json.dumps(said, sort_keys=True), **write_ours(adapter)}
