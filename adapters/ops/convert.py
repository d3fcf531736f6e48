"""From one dialect to another, and how near the new file comes to the old one."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import with_strength_convention
from diffgraft.adapters.formats import dialect_of, load_for_base, only_word, save_adapter
from diffgraft.adapters.formats.elsewhere import remarks
from diffgraft.adapters.formats.verify import LossyWriteError
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.ops.compare import Comparison, compare
from diffgraft.adapters.ops.resize import Reduced, resize
from diffgraft.adapters.registry import read_delta, read_network, written_dialects
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.files import PARTIAL, check_new

PRECISIONS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Converted:
    """A file in its new dialect."""

    path: Path
    comparison: Comparison
    """Of the old file and the new one, both read from disk"""
    approximated: bool
    """Whether modules became LoRAs because the dialect cannot hold what they were"""
    dropped: tuple[str, ...]
    """What approximating left out, as no LoRA can hold it: differences of biases, of norms and of embeddings"""
    remarks: tuple[str, ...]
    """What other programs make of the new file, where it is not what the adapter does"""


def convert(
    source: str | Path | Adapter,
    path: str | Path,
    dialect: str,
    approximate: RankBudget | None = None,
    weights: Weights | None = None,
    device: str = "cpu",
    precision: str = "",
) -> Converted:
    """Write the adapter at `source` to `path` in `dialect`.

    Args:
        source: a file in any dialect, a folder of peft's, or an adapter that was read, as by `read_part`.
        path: of the new file.
        dialect: the name of a dialect in `registry.written_dialects()`, or ``auto``.
        approximate: where the dialect cannot hold the adapter, LoRAs of this size in its place.
        weights: the base, for approximations of methods that are functions of its weights.
        device: where approximations and errors are computed.
        precision: a key of `PRECISIONS`, to which all numbers are rounded. Empty: they stay as they are.

    Raises:
        DiffgraftError: the dialect cannot hold the adapter, and no approximation was asked for; there is no such
            precision; something is at `path` already.
    """
    path = check_new(path)
    adapter = source if isinstance(source, Adapter) else load_for_base(source, weights)
    rounded = in_precision(adapter, precision) if precision else adapter
    found: Reduced | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    # all checks are made on a file in a folder beside, under the very name that some tools read a word from
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        new = Path(folder) / path.name
        try:
            save_adapter(rounded, new, dialect)
        except LossyWriteError:
            raise
        except DiffgraftError as error:
            reason = str(error).replace(str(new), str(path))
            if not _can_be_approximated(adapter, dialect):
                raise DiffgraftError(reason) from error
            if approximate is None:
                raise DiffgraftError(f"{reason} With --rank or --energy it is approximated by LoRAs.") from error
            found = resize(adapter, approximate, weights, device)
            save_adapter(in_precision(found.adapter, precision) if precision else found.adapter, new, dialect)
        again = load_for_base(new, weights)
        written = written_dialects()[dialect_of(again, dialect)]
        said = (*filter(None, [written.note]), *remarks(again, written.name, path.stem))
        comparison = compare(adapter, again, weights, device)
        new.rename(path)
    return Converted(path, comparison, found is not None, found.dropped if found else (), said)


def read_part(source: str | Path, only: str, weights: Weights | None = None) -> Adapter:
    """The adapter at `source`, or of it ``weights``, ``words`` or one word alone; empty `only` stands for all of it.

    Raises:
        DiffgraftError: it cannot be read, or there is no such word in it.
    """
    adapter = load_for_base(source, weights)
    return part_of(adapter, only) if only else adapter


def part_of(adapter: Adapter, only: str) -> Adapter:
    """Its weights and networks, its words, or one of them.

    Raises:
        DiffgraftError: there is no such word in it.
    """
    if only == "weights":
        return replace(adapter, tokens={})
    if only == "words":
        return replace(adapter, deltas={}, networks=())
    if only not in adapter.tokens:
        known = ["weights", "words", *adapter.tokens]
        raise DiffgraftError(f"There is nothing called {only!r} in the file: {did_you_mean(only, known)}")
    return only_word(adapter, only)


def in_precision(adapter: Adapter, precision: str) -> Adapter:
    """With every number rounded to a key of `PRECISIONS`.

    Raises:
        DiffgraftError: there is no such precision, or a number is beyond its range.
    """
    if precision not in PRECISIONS:
        raise DiffgraftError(f"There is no precision {precision!r}: {did_you_mean(precision, PRECISIONS)}")
    dtype = PRECISIONS[precision]

    largest = torch.finfo(dtype).max

    def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in tensors.items():
            if value.is_floating_point() and value.numel() and float(value.float().abs().max()) > largest:
                raise DiffgraftError(
                    f"A number in {name} is beyond {largest:g}, the largest of {precision}: take another precision."
                )
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def again(delta: Delta) -> Delta:
        found = read_delta(delta.kind, rounded(delta.leaves), delta.alpha)
        return with_strength_convention(found, delta.follows) if delta.follows else found

    return Adapter(
        {path: tuple(map(again, own)) for path, own in adapter.deltas.items()},
        adapter.metadata,
        tuple(read_network(network.kind, rounded(network.tensors), network.settings) for network in adapter.networks),
        {word: rounded(vectors) for word, vectors in adapter.tokens.items()},
    )


def _can_be_approximated(adapter: Adapter, dialect: str) -> bool:
    """Whether LoRAs in the place of its modules may be what the dialect can hold."""
    plain = {"lora_down", "lora_up"}
    others = any(len(own) > 1 or set(own[0].leaves) != plain for own in adapter.deltas.values())
    return others and dialect in written_dialects() and not adapter.networks
