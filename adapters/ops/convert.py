"""Conversion of adapter files between dialects, and measurement of the error of the new file."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats import dialect_of, load_for_base, only_word, save_adapter
from diffgraft.adapters.formats.compatibility import compatibility_notes
from diffgraft.adapters.formats.families import with_base_of
from diffgraft.adapters.formats.original_names import is_for_transformer
from diffgraft.adapters.formats.verify import LossyWriteError
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.control_lora import ControlLora
from diffgraft.adapters.methods.controlnet import ControlNetwork
from diffgraft.adapters.ops.all_timesteps import at_all_timesteps
from diffgraft.adapters.ops.compare import AdapterComparison, compare
from diffgraft.adapters.ops.effect import shapes_of
from diffgraft.adapters.ops.resize import ReducedAdapter, resize
from diffgraft.adapters.registry import read_delta, read_network, with_leaves, written_dialects
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean, one_line
from diffgraft.files import PARTIAL, check_new

PRECISIONS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""Name of a precision → dtype"""


_NEEDS_BASE = "Files of this format hold new weights, not differences: name the base (--base)."


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: a file in another dialect."""

    path: Path
    """Path of the new file"""
    comparison: AdapterComparison
    """Differences between the old and the new file, both read from disk"""
    approximated: bool
    """Whether modules became LoRAs, because the dialect cannot hold their kinds"""
    dropped: tuple[str, ...]
    """Differences of biases, norms and embeddings that the approximation dropped, as a LoRA cannot hold them"""
    remarks: tuple[str, ...]
    """Sentences on how other programs misread the new file"""


def convert(
    source: str | Path | Adapter,
    path: str | Path,
    dialect: str,
    approximate: RankBudget | None = None,
    weights: Weights | None = None,
    device: str = "cpu",
    precision: str = "",
) -> Converted:
    """Write the adapter in `source` to `path` in `dialect`.

    Args:
        source: a file in any dialect, a folder written by peft, or an adapter in memory, as from `read_part`.
        path: path of the new file.
        dialect: name of a dialect in `registry.written_dialects()`, or ``auto``.
        approximate: size of the LoRAs that replace modules if the dialect cannot hold them; None: raise an error.
        weights: weights of the base, needed to approximate methods that are functions of them, and for dialects that
            hold new weights.
        device: device on which approximations and errors are computed.
        precision: key of `PRECISIONS` to which all values are rounded; empty: they are not rounded.

    Raises:
        DiffgraftError: the dialect cannot hold the adapter and `approximate` is None, `precision` is unknown, or `path`
            exists already.
    """
    path = check_new(path)
    adapter = source if isinstance(source, Adapter) else load_for_base(source, weights)
    if weights is not None and is_for_transformer(adapter):
        adapter = with_base_of(adapter, weights)  # names in files depend on the family
    if (target := written_dialects().get(dialect)) is not None and target.holds_new_weights:
        adapter = with_new_weights(adapter, weights, device)
    if dialect == ControlNetwork.kind and any(isinstance(network, ControlLora) for network in adapter.networks):
        adapter = _with_merged_networks(adapter, weights)
    rounded = in_precision(adapter, precision) if precision else adapter
    approximation: ReducedAdapter | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    # all checks are made on a file in a temporary folder, under its final name, from which some tools read the word
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        partial = Path(folder) / path.name
        try:
            save_adapter(rounded, partial, dialect)
        except LossyWriteError:
            raise
        except DiffgraftError as error:
            reason = str(error).replace(str(partial), str(path))
            if not _can_be_approximated(adapter, dialect):
                raise DiffgraftError(reason) from error
            if approximate is None:
                raise DiffgraftError(f"{reason} Use --rank or --energy to approximate it by LoRAs.") from error
            approximation = resize(adapter, approximate, weights, device)
            loras = approximation.adapter
            save_adapter(in_precision(loras, precision) if precision else loras, partial, dialect)
        again = load_for_base(partial, weights)
        written = written_dialects()[dialect_of(again, dialect)]
        notes = (*filter(None, [written.note]), *compatibility_notes(again, written.name, path.stem))
        comparison = compare(adapter, again, weights, device)
        partial.rename(path)
    return Converted(path, comparison, approximation is not None, approximation.dropped if approximation else (), notes)


def read_part(source: str | Path, only: str, weights: Weights | None = None) -> Adapter:
    """Read the adapter at `source`, and select ``weights``, ``words`` or a single word of it; empty `only`: everything.

    Raises:
        DiffgraftError: the file cannot be read, or has no such word.
    """
    adapter = load_for_base(source, weights)
    return part_of(adapter, only) if only else adapter


def part_of(adapter: Adapter, only: str) -> Adapter:
    """Select from an adapter its ``weights`` (with networks), its ``words``, or a single word.

    Raises:
        DiffgraftError: the adapter has no such word.
    """
    if only == "weights":
        return replace(adapter, tokens={})
    if only == "words":
        return replace(adapter, deltas={}, networks=())
    if only not in adapter.tokens:
        known = ["weights", "words", *adapter.tokens]
        raise DiffgraftError(f"The file contains nothing called {only!r}: {did_you_mean(only, known)}")
    return only_word(adapter, only)


def with_new_weights(adapter: Adapter, weights: Weights | None, device: str = "cpu") -> Adapter:
    """Replace the deltas of each module by the weight and bias that they make of those of the base.

    Raises:
        DiffgraftError: the adapter needs the base's weights, and `weights` is None or of another base.
    """
    changed = {path: deltas for path, deltas in adapter.deltas.items() if [d.kind for d in deltas] != ["replacement"]}
    if not changed:
        return adapter
    if weights is None:
        raise DiffgraftError(_NEEDS_BASE)
    changed = dict(at_all_timesteps("The adapter", replace(adapter, deltas=changed)).deltas)
    shapes_of(replace(adapter, deltas=changed), weights)  # raises if the adapter does not fit
    replacements: dict[str, tuple[Delta, ...]] = {}
    for path, deltas in changed.items():
        weight = weights[f"{path}.weight"].float().to(device)
        bias = weights[f"{path}.bias"].float().to(device) if f"{path}.bias" in weights else None
        for delta in deltas:
            weight, bias = delta.apply(weight, bias, 1.0)
        leaves = {"weight": weight.cpu(), **({"bias": bias.cpu()} if bias is not None else {})}
        replacements[path] = (read_delta("replacement", leaves, None),)
    return replace(adapter, deltas={**adapter.deltas, **replacements})


def _with_merged_networks(adapter: Adapter, weights: Weights | None) -> Adapter:
    """Replace Control-LoRAs by ControlNets with whole weights.

    Raises:
        DiffgraftError: `weights` is None or of another base.
    """
    if weights is None:
        raise DiffgraftError(_NEEDS_BASE)
    base = meta_base(weights.source)

    def value(name: str) -> Tensor:
        return weights[f"{base.family.denoiser}.{name}"]

    try:
        merged = [own.merged(base, value) if isinstance(own, ControlLora) else own for own in adapter.networks]
    except (ValueError, KeyError) as error:
        raise DiffgraftError(f"The adapter does not fit this base: {one_line(error)}.") from error
    return replace(adapter, metadata={**adapter.metadata, "method": merged[0].kind}, networks=tuple(merged))


def in_precision(adapter: Adapter, precision: str) -> Adapter:
    """Round all values of an adapter to a key of `PRECISIONS`.

    Raises:
        DiffgraftError: the precision is unknown, or a value is beyond its range.
    """
    if precision not in PRECISIONS:
        raise DiffgraftError(f"Invalid value precision={precision!r}: {did_you_mean(precision, PRECISIONS)}")
    dtype = PRECISIONS[precision]

    largest = torch.finfo(dtype).max

    def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in tensors.items():
            if value.is_floating_point() and value.numel() and float(value.float().abs().max()) > largest:
                raise DiffgraftError(
                    f"A value in {name} is beyond {largest:g}, the largest of {precision}: choose another precision."
                )
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def rounded_delta(delta: Delta) -> Delta:
        return with_leaves(delta, rounded(delta.leaves))

    return Adapter(
        {path: tuple(map(rounded_delta, deltas)) for path, deltas in adapter.deltas.items()},
        adapter.metadata,
        tuple(read_network(network.kind, rounded(network.tensors), network.settings) for network in adapter.networks),
        {word: rounded(vectors) for word, vectors in adapter.tokens.items()},
    )


def _can_be_approximated(adapter: Adapter, dialect: str) -> bool:
    """Whether replacing its modules by LoRAs can make the adapter one that the dialect can hold."""
    plain = {"lora_down", "lora_up"}
    others = any(len(deltas) > 1 or set(deltas[0].leaves) != plain for deltas in adapter.deltas.values())
    target = written_dialects().get(dialect)
    return others and target is not None and not target.holds_new_weights and not adapter.networks
