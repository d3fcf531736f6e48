"""This project's own layout, which holds any method.

Deltas are ``<path>.<n>.<leaf>``, one n for each delta of a module, in order; networks are ``network.<n>.<name>``, and
words ``token.<n>.<text encoder>``. Three header keys hold JSON: ``diffgraft_deltas`` path → list of {"kind", "alpha"},
``diffgraft_networks`` a list of {"kind", "settings"}, ``diffgraft_tokens`` a list of words. ``kind`` is the name of the
method that reads it again, ours or one from an outside package. The header key ``diffgraft`` is as everywhere.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import OURS, number, parsed, read_json, write_ours
from diffgraft.adapters.registry import read_delta, read_network
from diffgraft.errors import did_you_mean

_DELTAS, _NETWORKS, _TOKENS = "diffgraft_deltas", "diffgraft_networks", "diffgraft_tokens"


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the header has this dialect's keys."""
    return any(key in header for key in (_DELTAS, _NETWORKS, _TOKENS))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key is used, or named in a ValueError."""
    left = dict(tensors)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, listed in read_json(header, _DELTAS).items():
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise ValueError(f"its header says {listed!r} of {path}, which is no list of deltas")
        built = []
        for place, said in enumerate(listed):
            leaves = _take(left, f"{path}.{place}.")
            alpha = said.get("alpha")
            try:
                built.append(read_delta(str(said.get("kind")), leaves, None if alpha is None else number(alpha)))
            except (ValueError, LookupError) as error:
                raise ValueError(f"the leaves of {path} do not fit together: {error}") from error
        deltas[path] = tuple(built)
    networks = []
    for place, said in enumerate(_listed(header, _NETWORKS, dict)):
        tensors_of, settings = _take(left, f"network.{place}."), said.get("settings") or {}
        try:
            networks.append(read_network(str(said.get("kind")), tensors_of, settings))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"its network {place} cannot be built: {error}") from error
    tokens = {word: _take(left, f"token.{place}.") for place, word in enumerate(_listed(header, _TOKENS, str))}
    if left:
        strange = next(iter(left))
        hint = did_you_mean(strange, set(tensors) - set(left)).rstrip(".?")
        raise ValueError(f"its key {strange} belongs to nothing that the header lists; {hint}")
    return Adapter(deltas, read_json(header, OURS), tuple(networks), tokens)


def _take(left: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with `start`, taken out of `left`, by the rest of their keys."""
    return {key.removeprefix(start): left.pop(key) for key in list(left) if key.startswith(start)}


def _listed(header: Mapping[str, str], key: str, kind: type) -> list[Any]:
    listed = parsed(header, key, "[]")
    if not isinstance(listed, list) or not all(isinstance(one, kind) for one in listed):
        raise ValueError(f"its header entry {key!r} is no such list as belongs there")
    return listed


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for path, deltas in adapter.deltas.items():
        said[path] = [{"kind": delta.kind, "alpha": delta.alpha} for delta in deltas]
        for place, delta in enumerate(deltas):
            tensors |= {f"{path}.{place}.{name}": leaf.contiguous() for name, leaf in delta.leaves.items()}
    header = {"format": "pt", **write_ours(adapter)}
    if adapter.deltas:
        header[_DELTAS] = json.dumps(said, sort_keys=True)
    if adapter.networks:
        listed = [{"kind": network.kind, "settings": dict(network.settings)} for network in adapter.networks]
        header[_NETWORKS] = json.dumps(listed, sort_keys=True)
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
    holds_networks=True,
    note="No other program reads diffgraft's own layout: for others use --to kohya or webui.",
)
