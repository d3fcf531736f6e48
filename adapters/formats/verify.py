"""Whether the writer of a dialect wrote everything that it was given: its result is read again, in memory.

What is compared is what is there: paths, leaves with their sizes, words with their vectors, networks, and metadata.
Numbers of weights are not, as comparing those would take as long as saving; the tests hold them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.families import as_diffusers, layers_of, with_family
from diffgraft.adapters.formats.joined import joined
from diffgraft.adapters.formats.loading import UnreadableError, read_contents
from diffgraft.adapters.registry import read_delta
from diffgraft.errors import DiffgraftError


class LossyWriteError(DiffgraftError):
    """The writer of a dialect left out something that it was given, without saying so."""


def check_contents(adapter: Adapter, tensors: Mapping[str, Tensor], header: Mapping[str, str], dialect: str) -> None:
    """Check that what a dialect made of an adapter is read again as that adapter.

    Args:
        adapter: what was given to the writer.
        tensors: what the writer returned.
        header: the same.
        dialect: its name, for the message.

    Raises:
        LossyWriteError: something is missing, or cannot be read.
    """
    try:
        found = read_contents(tensors, header, layers_of(adapter))
    except UnreadableError as error:
        raise LossyWriteError(
            f"The adapter was not saved: in the format {dialect!r} it could not be read again, as {error}."
        ) from error
    reason = next(_missing(adapter, *found), None) if found else "no format recognises what was written"
    if reason is not None:
        raise LossyWriteError(
            f"The adapter was not saved: the format {dialect!r} did not write everything that it holds ({reason}). "
            "The fault is in the format's writer."
        )


def _missing(adapter: Adapter, again: Adapter, reader: Any) -> Iterator[str]:
    """What was given and is not read again, one half-sentence for each."""
    given = as_diffusers(with_family(adapter))
    for path, deltas in given.deltas.items():
        there = _outline(again.deltas.get(path, ()))
        if there not in (_outline(deltas), _outline(_joined(path, deltas))):
            yield f"{path} is read again as {_told(there)}, and is {_told(_outline(deltas))}"
    if strange := again.deltas.keys() - given.deltas.keys():
        yield f"{min(strange)} is read again, which the adapter does not change"
    for word, vectors in given.tokens.items():
        others = again.tokens.get(word, {})
        for part, rows in vectors.items():
            if part not in others or not torch.equal(others[part], rows):
                yield f"the vectors of the word {word!r} for {part} are not read again"
    for place, network in enumerate(given.networks):
        other = again.networks[place] if place < len(again.networks) else None
        if other is None or other.kind != network.kind or _sizes(other.tensors) != _sizes(network.tensors):
            yield f"the {network.kind} is not read again"
    if reader.keeps_metadata:
        for key, value in json.loads(json.dumps(dict(adapter.metadata))).items():
            if not _holds(again.metadata.get(key), value):
                yield f"the metadata entry {key!r} is not read again"


def _outline(deltas: Sequence[Delta]) -> Counter[tuple[str, frozenset[tuple[str, int]]]]:
    """Kind and leaves of each delta, in any order."""
    return Counter((delta.kind, frozenset(_sizes(delta.leaves).items())) for delta in deltas)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name → how many numbers: files may write a row of numbers as a column."""
    return {name: value.numel() for name, value in tensors.items()}


def _joined(path: str, deltas: Sequence[Delta]) -> Sequence[Delta]:
    """Several deltas of one module as dialects with one name for each module write them; shapes only."""
    if len(deltas) < 2:
        return deltas
    shadows = [read_delta(d.kind, {name: leaf.to("meta") for name, leaf in d.leaves.items()}, d.alpha) for d in deltas]
    try:
        return joined(path, shadows)
    except ValueError:
        return deltas


def _told(outline: Counter[tuple[str, frozenset[tuple[str, int]]]]) -> str:
    said = [f"{kind} ({', '.join(sorted(name for name, _ in leaves))})" for kind, leaves in outline.elements()]
    return " and ".join(said) or "nothing"


def _holds(there: Any, given: Any) -> bool:
    """Whether `there` says all that `given` does; dialects add what they know of the base."""
    if isinstance(there, dict) and not isinstance(given, dict):
        return True  # a base that was a bare name, in the place of which a dialect puts the family it has recognised
    if isinstance(given, dict) and isinstance(there, dict):
        return all(key in there and _holds(there[key], value) for key, value in given.items())
    return bool(there == given)
