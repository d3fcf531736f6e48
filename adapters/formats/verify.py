"""Verification that the writer of a dialect wrote everything: its result is read again in memory, and compared.

Compared are paths, leaves with their sizes, words with their embeddings, networks, and metadata. The values of weights
are not compared, as that would take as long as saving; tests cover them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.families import layers_of, with_diffusers_projections, with_family
from diffgraft.adapters.formats.join_deltas import join_deltas
from diffgraft.adapters.formats.loading import UnreadableError, read_contents
from diffgraft.adapters.formats.original_names import PART
from diffgraft.adapters.formats.row_blocks import adds_nothing
from diffgraft.adapters.registry import read_delta
from diffgraft.errors import DiffgraftError


class LossyWriteError(DiffgraftError):
    """The writer of a dialect dropped something without raising an error."""


def check_contents(adapter: Adapter, tensors: Mapping[str, Tensor], header: Mapping[str, str], dialect: str) -> None:
    """Check that what a dialect wrote for an adapter is read again as that adapter.

    Args:
        adapter: the adapter that was passed to the writer.
        tensors: tensors that the writer returned.
        header: header that the writer returned.
        dialect: name of the dialect, for messages.

    Raises:
        LossyWriteError: something is missing, or cannot be read.
    """
    try:
        read_again = read_contents(tensors, header, layers_of(adapter))
    except UnreadableError as error:
        raise LossyWriteError(
            f"The adapter was not saved: the format {dialect!r} wrote something that it cannot read again: {error}."
        ) from error
    reason = next(_missing(adapter, *read_again), None) if read_again else "no format recognises what was written"
    if reason is not None:
        raise LossyWriteError(
            f"The adapter was not saved: the format {dialect!r} did not write everything ({reason}). This is an error "
            "in the format's writer."
        )


def _missing(adapter: Adapter, again: Adapter, dialect: Any) -> Iterator[str]:
    """Yield a half-sentence for each part of `adapter` that is not read again."""
    expected = with_diffusers_projections(with_family(adapter))
    for path, deltas in expected.deltas.items():
        structure = _structure(again.deltas.get(path, ()))
        if structure not in (_structure(deltas), _structure(_joined(path, deltas))) and not (
            path.startswith(f"{PART}.") and _may_be_fused(path, deltas, again.deltas.get(path, ()))
        ):
            yield f"{path} is read again as {_describe(structure)} instead of {_describe(_structure(deltas))}"
        elif {delta.rank_schedule for delta in again.deltas.get(path, ())} != {delta.rank_schedule for delta in deltas}:
            yield f"the ranks by timestep of {path} are not read again"
    if unknown := again.deltas.keys() - expected.deltas.keys():
        yield f"{min(unknown)} is read again, which the adapter does not change"
    for word, vectors in expected.tokens.items():
        again_vectors = again.tokens.get(word, {})
        for part, rows in vectors.items():
            if part not in again_vectors or not torch.equal(again_vectors[part], rows):
                yield f"the embeddings of the word {word!r} for {part} are not read again"
    for place, network in enumerate(expected.networks):
        other = again.networks[place] if place < len(again.networks) else None
        if other is None or other.kind != network.kind or _sizes(other.tensors) != _sizes(network.tensors):
            yield f"the {network.kind} is not read again"
    if dialect.keeps_metadata:
        for key, value in json.loads(json.dumps(dict(adapter.metadata))).items():
            if not _contains(again.metadata.get(key), value):
                yield f"the metadata entry {key!r} is not read again"


def _may_be_fused(path: str, deltas: Sequence[Delta], again: Sequence[Delta]) -> bool:
    """Whether the deltas of a layer may have become `again` by being joined with others of a fused layer, and split.

    Ranks may have changed, zeros may have been added for a bias, and deltas that add nothing may be gone.
    """
    before, after = (
        Counter((delta.kind, delta.matrix_shape) for delta in own if not adds_nothing(delta))
        for own in (_joined_values(path, deltas), again)
    )
    return before == after


def _joined_values(path: str, deltas: Sequence[Delta]) -> Sequence[Delta]:
    """Deltas of one layer, joined where dialects with a single name per module join them."""
    if len(deltas) < 2 or all(delta.kind == "lokr" for delta in deltas):
        return deltas
    try:
        return join_deltas(path, deltas)
    except ValueError:
        return deltas


def _structure(deltas: Sequence[Delta]) -> Counter[tuple[str, frozenset[tuple[str, int]]]]:
    """Kinds of deltas with the names and sizes of their leaves, in any order."""
    return Counter((delta.kind, frozenset(_sizes(delta.leaves).items())) for delta in deltas)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name of each tensor → number of values, which does not change if a file stores a row as a column."""
    return {name: value.numel() for name, value in tensors.items()}


def _joined(path: str, deltas: Sequence[Delta]) -> Sequence[Delta]:
    """Deltas of one module, joined as dialects with a single name per module write them, on the meta device."""
    if len(deltas) < 2:
        return deltas
    on_meta = [read_delta(d.kind, {name: leaf.to("meta") for name, leaf in d.leaves.items()}, d.alpha) for d in deltas]
    try:
        return join_deltas(path, on_meta)
    except ValueError:
        return deltas


def _describe(structure: Counter[tuple[str, frozenset[tuple[str, int]]]]) -> str:
    kinds = [f"{kind} ({', '.join(sorted(name for name, _ in leaves))})" for kind, leaves in structure.elements()]
    return " and ".join(kinds) or "nothing"


def _contains(value: Any, expected: Any) -> bool:
    """Whether `value` contains everything in `expected`; dialects may add what they know of the base."""
    if isinstance(value, dict) and not isinstance(expected, dict):
        return True  # the name of a base alone is replaced by the family that a dialect has recognised
    if isinstance(expected, dict) and isinstance(value, dict):
        return all(key in value and _contains(value[key], inner) for key, inner in expected.items())
    return bool(value == expected)
