"""This project's own layout, which can hold adapters of any method.

Deltas are ``<path>.<n>.<leaf>``, where n counts the deltas of a module in order; networks are ``network.<n>.<name>``,
and words ``token.<n>.<text encoder>``. Three header keys hold JSON: ``diffgraft_deltas`` path → list of {"kind",
"alpha"}, ``diffgraft_networks`` a list of {"kind", "settings"}, ``diffgraft_tokens`` a list of words. ``kind`` is the
name of the method that reads the entry, built in or from an outside package. The header key ``diffgraft`` holds the
metadata, as in all dialects.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import DIFFGRAFT_KEY, finite_number, parse_json, read_json, write_metadata
from diffgraft.adapters.formats.original_names import is_for_transformer
from diffgraft.adapters.registry import read_delta, read_network
from diffgraft.errors import did_you_mean

_DELTAS, _NETWORKS, _TOKENS = "diffgraft_deltas", "diffgraft_networks", "diffgraft_tokens"


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the header has one of this dialect's keys."""
    return any(key in header for key in (_DELTAS, _NETWORKS, _TOKENS))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError for a key that the header does not list, or for invalid contents."""
    remaining = dict(tensors)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, entries in read_json(header, _DELTAS).items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"its header has {entries!r} for {path}; expected a list of deltas")
        built = []
        for place, entry in enumerate(entries):
            leaves = _pop_prefix(remaining, f"{path}.{place}.")
            alpha = entry.get("alpha")
            try:
                alpha = None if alpha is None else finite_number(alpha)
                built.append(read_delta(str(entry.get("kind")), leaves, alpha))
            except (ValueError, LookupError) as error:
                raise ValueError(f"the leaves of {path} do not fit together: {error}") from error
        deltas[path] = tuple(built)
    networks = []
    for place, entry in enumerate(_list_entry(header, _NETWORKS, dict)):
        network_tensors = _pop_prefix(remaining, f"network.{place}.")
        settings = entry.get("settings") or {}
        try:
            networks.append(read_network(str(entry.get("kind")), network_tensors, settings))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"its network {place} is invalid: {error}") from error
    words = _list_entry(header, _TOKENS, str)
    tokens = {word: _pop_prefix(remaining, f"token.{place}.") for place, word in enumerate(words)}
    if remaining:
        unknown = next(iter(remaining))
        hint = did_you_mean(unknown, set(tensors) - set(remaining)).rstrip(".?")
        raise ValueError(f"its header does not list the key {unknown}; {hint}")
    return Adapter(deltas, read_json(header, DIFFGRAFT_KEY), tuple(networks), tokens)


def _pop_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors with keys that begin with `prefix` from `tensors`, and return them by the rest of the key."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _list_entry(header: Mapping[str, str], key: str, kind: type) -> list[Any]:
    entry = parse_json(header, key, "[]")
    if not isinstance(entry, list) or not all(isinstance(item, kind) for item in entry):
        raise ValueError(f"its header entry {key!r} is not a list of {'names' if kind is str else 'objects'}")
    return entry


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for path, deltas in adapter.deltas.items():
        entries[path] = [{"kind": delta.kind, "alpha": delta.alpha} for delta in deltas]
        for place, delta in enumerate(deltas):
            tensors |= {f"{path}.{place}.{name}": leaf.contiguous() for name, leaf in delta.leaves.items()}
    header = {"format": "pt", **write_metadata(adapter)}
    if adapter.deltas:
        header[_DELTAS] = json.dumps(entries, sort_keys=True)
    if adapter.networks:
        networks = [{"kind": network.kind, "settings": dict(network.settings)} for network in adapter.networks]
        header[_NETWORKS] = json.dumps(networks, sort_keys=True)
        for place, network in enumerate(adapter.networks):
            tensors |= {f"network.{place}.{name}": value.contiguous() for name, value in network.tensors.items()}
    if adapter.tokens:
        header[_TOKENS] = json.dumps(list(adapter.tokens))
        for place, vectors in enumerate(adapter.tokens.values()):
            tensors |= {f"token.{place}.{part}": value.contiguous() for part, value in vectors.items()}
    return tensors, header


DIALECT = Dialect(
    name="diffgraft",
    summary="diffgraft's own layout, which holds any adapter",
    order=10,
    recognises=recognises,
    read=read,
    write=write,
    auto=40,
    is_preferred=is_for_transformer,
    holds_networks=True,
    note="No other program reads diffgraft's own layout: for others use --to kohya or webui.",
)
