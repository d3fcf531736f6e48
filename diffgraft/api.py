"""The commands `plan`, `convert`, `combine`, `resize`, `extract`, `merge`, `inspect` and `grid` as Python functions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_for_base
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.devices import device_of, dtype_of
from diffgraft.errors import DiffgraftError, check_options, wrap_system_errors
from diffgraft.files import check_new

if TYPE_CHECKING:
    from diffgraft.adapters.ops.convert import Converted
    from diffgraft.adapters.ops.inspect import AdapterReport
    from diffgraft.bases import Base
    from diffgraft.bases.weights import Weights
    from diffgraft.trainers.planning.plan import Plan

File = str | PathLike[str] | Adapter
"""Path of an adapter file, folder of a run, or an `Adapter` in memory"""


class Approximation(TypedDict, total=False):
    """Options for approximating adapters by LoRAs: their rank, the base they need, and the device."""

    rank: int | None
    """Rank of each module's LoRA"""
    energy: float | None
    """Share of each module's squared norm to keep, 0 to 1; sets the rank of each module, instead of `rank`"""
    base: str | None
    """Base of the adapters (name or path); needed by methods whose change depends on its weights, such as DoRA"""
    device: str
    """Device that computes; the CPU by default"""


@wrap_system_errors
def plan(recipe: str | Path = "subject", /, **settings: Any) -> "Plan":
    """Predict what `train` would do with the same arguments, without training.

    Printing the result gives the same text as the command `diffgraft plan`.

    Raises:
        DiffgraftError: `train` would refuse these arguments before its first step.
    """
    from diffgraft.trainers.planning.plan import plan_run

    return plan_run(recipe, settings)


@wrap_system_errors
def convert(
    source: str | PathLike[str],
    path: str | Path,
    format: str = "auto",  # noqa: A002  (the public face says `format`)
    *,
    only: str = "",
    precision: str = "",
    **approximation: Unpack[Approximation],
) -> "Converted":
    """Write an adapter in another file format.

    Args:
        source: an adapter file in any known format, the folder of a run, or a peft folder.
        path: path of the new file, which must not exist.
        format: a name from `diffgraft.adapters.registry.written_dialects()`, or ``auto``.
        only: write only the ``weights``, only the ``words``, or only the word of this name; empty: everything.
        precision: ``float16``, ``bfloat16`` or ``float32``; empty: keep each tensor's dtype.
        approximation: options of `Approximation`; they let LoRAs approximate what the format cannot hold exactly.

    Raises:
        DiffgraftError: the format cannot hold the adapter, or `path` exists.
    """
    from diffgraft.adapters.ops.convert import convert as write_converted
    from diffgraft.adapters.ops.convert import read_part

    check_options("convert", approximation, Approximation)
    device = str(device_of(approximation.get("device", "cpu")))
    with _weights(approximation.get("base")) as weights:
        size = _size(approximation.get("rank"), approximation.get("energy"))
        check_new(path)
        adapter = read_part(_path(source), only, weights)
        return write_converted(adapter, path, format, size, weights, device, precision)


@wrap_system_errors
def combine(
    adapters: Mapping[Any, Any],
    *,
    algorithm: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    captions: str | Path | None = None,
    **approximation: Unpack[Approximation],
) -> Adapter:
    """Combine several adapters into one adapter made of LoRAs.

    Args:
        adapters: file, run or `Adapter` → its strength, or its strengths by part or block.
        algorithm: ``sum``, ``ties``, ``dare``, or ``concepts``, which keeps the words of each adapter apart.
        density: with ``ties`` and ``dare``, the share of entries to keep, 0 to 1.
        seed: with ``dare``, the seed for choosing those entries.
        captions: with ``concepts``, a text file of captions of pictures that are to stay the same, one a line.
        approximation: options of `Approximation`; without rank and energy the ranks are large enough to be exact.

    Raises:
        DiffgraftError: the adapters cannot be combined, or a file is not an adapter.
    """
    from diffgraft.adapters.ops.combine import combine as combine_adapters

    if not isinstance(adapters, Mapping) or not adapters:
        raise DiffgraftError(
            "Invalid adapters: must be a mapping of files to strengths, such as {FILE: 0.8, OTHER: 0.5}."
        )
    check_options("combine", approximation, Approximation)
    device = str(device_of(approximation.get("device", "cpu")))
    with _weights(approximation.get("base")) as weights:
        named = [(_name(file), _loaded(file, weights), strength) for file, strength in adapters.items()]
        size = _size(approximation.get("rank"), approximation.get("energy"))
        if algorithm == "concepts":
            from diffgraft.adapters.ops.concepts import merge_concepts, open_text

            return merge_concepts(named, *open_text(approximation.get("base"), captions), size, weights).adapter
        return combine_adapters(named, size, algorithm, density, seed, weights, device).adapter


@wrap_system_errors
def resize(
    adapter: File,
    rank: int | None = None,
    *,
    energy: float | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> Adapter:
    """Approximate an adapter of any method by LoRAs of a given rank.

    Args:
        adapter: an adapter file, the folder of a run, or an `Adapter`.
        rank: rank of each module's LoRA.
        energy: share of each module's squared norm to keep, 0 to 1; sets the rank of each module, instead of `rank`.
        base: base of the adapter; needed by methods whose change depends on its weights, such as DoRA.
        device: device that computes.

    Raises:
        DiffgraftError: both rank and energy are missing, or the adapter needs a base.
    """
    from diffgraft.adapters.ops.resize import resize as resize_adapter

    with _weights(base) as weights:
        return resize_adapter(
            _loaded(adapter, weights), _required_size(rank, energy), weights, str(device_of(device))
        ).adapter


@wrap_system_errors
def extract(
    tuned: str,
    base: str,
    rank: int | None = None,
    *,
    energy: float | None = None,
    method: str = "locon",
    device: str = "cpu",
) -> Adapter:
    """Extract the difference between two checkpoints as an adapter.

    Args:
        tuned: the fine-tuned checkpoint: a diffusers folder or a ``.safetensors`` file.
        base: the checkpoint it was fine-tuned from, in either layout.
        rank: rank of each module.
        energy: share of each module's squared norm to keep, 0 to 1; sets the rank of each module, instead of `rank`.
        method: ``lora``, ``locon`` or ``loha``.
        device: device that computes.

    Raises:
        DiffgraftError: the checkpoints are of different architectures, or both rank and energy are missing.
    """
    from diffgraft.adapters.ops.extract import extract as extract_adapter
    from diffgraft.adapters.ops.extract import provenance

    tuned, base = str(_path(tuned)), str(_path(base))
    with _weights(tuned) as of_tuned, _weights(base) as of_base:
        assert of_tuned is not None
        assert of_base is not None
        size = _required_size(rank, energy)
        metadata = provenance(tuned, base)
        return extract_adapter(of_tuned, of_base, size, method, metadata, str(device_of(device))).adapter


@wrap_system_errors
def merge(
    adapters: Any,
    output: str | Path,
    *,
    base: "str | Path | Base" = "tiny",
    precision: str = "",
    device: str = "cpu",
) -> Path:
    """Write a checkpoint of `base` with adapters merged into its weights.

    Args:
        adapters: a file, a run or an `Adapter`, or a mapping of several to their strengths, as for `graft`.
        output: path of the checkpoint: a single file if it ends in ``.safetensors``, otherwise a diffusers folder.
        base: name or path of a base, as for `load_base`, or a loaded `Base`, which is left unchanged.
        precision: dtype of the checkpoint, ``float32``, ``float16`` or ``bfloat16``; empty: that of the base's files.
        device: device that computes.

    Returns:
        Path of the checkpoint.

    Raises:
        DiffgraftError: `output` exists, or an adapter holds words or networks, which cannot be merged into weights.
    """
    from diffgraft.bases import Base, load_base
    from diffgraft.generation.merge_checkpoint import merge_checkpoint

    path = check_new(output)  # before a base is loaded
    strengths = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    place = device_of(device)
    if not isinstance(base, Base):
        base = load_base(base, dtype_of(precision, place) if precision else None).to(place)
    return merge_checkpoint(base, strengths, path)


@wrap_system_errors
def inspect(adapter: File, device: str = "cpu") -> "AdapterReport":
    """Report an adapter's method, base and words, and the rank, norm and effective rank of each module.

    Raises:
        DiffgraftError: the file is not an adapter.
    """
    from diffgraft.adapters.ops.inspect import inspect as inspect_adapter

    return inspect_adapter(_loaded(adapter), str(device_of(device)))


@wrap_system_errors
def grid(pictures: Mapping[str, Sequence[Any]] | Sequence[Any]) -> Image.Image:
    """Lay out pictures in one image: labelled rows, or a single row.

    Args:
        pictures: label → list of pictures for one row each, or a list of pictures for a single row without label.
            A picture is a PIL image or the path of a file.

    Raises:
        DiffgraftError: the list is empty, a file cannot be read, or an item is neither a picture nor a path.
    """
    from diffgraft.generation.plots import grid as draw_grid

    labelled = pictures if isinstance(pictures, Mapping) else {"": pictures}
    rows: dict[str, list[Image.Image]] = {}
    for label, row in labelled.items():
        if isinstance(row, str | PathLike | Image.Image) or not isinstance(row, Iterable):
            kind = type(row).__name__
            raise DiffgraftError(f"Invalid pictures of type {kind}: must be a list of pictures or of paths.")
        rows[str(label)] = [_picture(picture) for picture in row]
    if not any(rows.values()):
        raise DiffgraftError("There are no pictures to lay out: give at least one.")
    return draw_grid({label: row for label, row in rows.items() if row})


def _picture(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, str | PathLike):
        kind = type(picture).__name__
        raise DiffgraftError(f"Invalid picture of type {kind}: must be a PIL image or a path.")
    from diffgraft.data.pictures import read_picture

    return read_picture(os.fsdecode(picture))


def _path(file: Any) -> Path:
    try:
        return Path(file)
    except TypeError as error:
        raise DiffgraftError(f"Invalid file {file!r}: must be a path.") from error


def _loaded(file: Any, weights: "Weights | None" = None) -> Adapter:
    return file if isinstance(file, Adapter) else load_for_base(file, weights)


def _name(file: Any) -> str:
    return f"The {file.method} adapter" if isinstance(file, Adapter) else str(_path(file))


def _size(rank: int | None, energy: float | None) -> RankBudget | None:
    return RankBudget(rank, energy) if rank is not None or energy is not None else None


def _required_size(rank: int | None, energy: float | None) -> RankBudget:
    size = _size(rank, energy)
    if size is None:
        raise DiffgraftError("The size of the adapter is missing: give rank=8, or energy=0.95.")
    return size


def _weights(base: str | None) -> "AbstractContextManager[Weights | None]":
    if base is None:
        return nullcontext()
    from diffgraft.bases.weights import open_weights

    return open_weights(base)
