"""The commands as functions, for scripts and notebooks: what `diffgraft plan`, `convert`, `combine` and others do."""

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
    from diffgraft.adapters.ops.inspect import Report
    from diffgraft.bases import Base
    from diffgraft.bases.weights import Weights
    from diffgraft.trainers.planning.plan import Plan

File = str | PathLike[str] | Adapter
"""A file, a run, or an adapter in memory"""


class Approximation(TypedDict, total=False):
    """How near LoRAs come to what they replace, and what is computed with."""

    rank: int | None
    """Of each module"""
    energy: float | None
    """The share of each module's squared norm that is kept, in the place of a rank"""
    base: str | None
    """What the adapters are for, where its weights matter"""
    device: str
    """Where it is computed; a processor where it is not given"""


@wrap_system_errors
def plan(recipe: str | Path = "subject", /, **settings: Any) -> "Plan":
    """What `train` would do with the same arguments, found out without doing it; printed, it reads as `diffgraft plan`.

    Raises:
        DiffgraftError: what `train` would refuse before it starts.
    """
    from diffgraft.trainers.planning.plan import planned

    return planned(recipe, settings)


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
    """Write an adapter file in another format.

    Args:
        source: a file in any format, a run, or a folder of peft's.
        path: of the new file.
        format: a name in `diffgraft.adapters.registry.written_dialects()`, or ``auto``.
        only: ``weights``, ``words``, or one word of the file.
        precision: ``float16``, ``bfloat16`` or ``float32``; empty: as it is.
        approximation: options of `Approximation`, for LoRAs that come near where the format cannot hold the adapter.

    Raises:
        DiffgraftError: the format cannot hold the adapter, or something is at `path` already.
    """
    from diffgraft.adapters.ops.convert import convert as change
    from diffgraft.adapters.ops.convert import read_part

    check_options("convert", approximation, Approximation)
    device = str(device_of(approximation.get("device", "cpu")))
    with _weights(approximation.get("base")) as weights:
        size = _size(approximation.get("rank"), approximation.get("energy"))
        check_new(path)
        given = read_part(_path(source), only, weights)
        return change(given, path, format, size, weights, device, precision)


@wrap_system_errors
def combine(
    adapters: Mapping[Any, Any],
    *,
    algorithm: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    **approximation: Unpack[Approximation],
) -> Adapter:
    """One adapter of LoRAs that does what several do together.

    Args:
        adapters: file, run or `Adapter` → strength, or strengths by part or block.
        algorithm: ``sum``, ``ties`` or ``dare``.
        density: with ``ties`` and ``dare``, the share of entries that stays.
        seed: with ``dare``, of the choice of entries.
        approximation: options of `Approximation`; with neither rank nor energy the result is as large as it takes.

    Raises:
        DiffgraftError: they do not go together, or something is no adapter.
    """
    from diffgraft.adapters.ops.combine import combine as together

    if not isinstance(adapters, Mapping) or not adapters:
        raise DiffgraftError(
            "Invalid adapters: must be a mapping of files to strengths, such as {FILE: 0.8, OTHER: 0.5}."
        )
    check_options("combine", approximation, Approximation)
    device = str(device_of(approximation.get("device", "cpu")))
    with _weights(approximation.get("base")) as weights:
        given = [(_name(file), _loaded(file, weights), strength) for file, strength in adapters.items()]
        size = _size(approximation.get("rank"), approximation.get("energy"))
        return together(given, size, algorithm, density, seed, weights, device).adapter


@wrap_system_errors
def resize(
    adapter: File,
    rank: int | None = None,
    *,
    energy: float | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> Adapter:
    """An adapter of any method as LoRAs of a rank, or of as many ranks as keep a share of each squared norm.

    Raises:
        DiffgraftError: neither is given, or it needs a base.
    """
    from diffgraft.adapters.ops.resize import resize as smaller

    with _weights(base) as weights:
        return smaller(_loaded(adapter, weights), _needed(rank, energy), weights, str(device_of(device))).adapter


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
    """The difference of two checkpoints as an adapter: `tuned` is what was made of `base`, either in either layout.

    Args:
        tuned: a diffusers folder or a ``.safetensors`` checkpoint.
        base: what it was trained from.
        rank: of each module.
        energy: the share of each module's squared norm that is kept, in the place of a rank.
        method: ``lora``, ``locon`` or ``loha``.
        device: where it is computed.

    Raises:
        DiffgraftError: they are of different kinds, or neither rank nor energy is given.
    """
    from diffgraft.adapters.ops.extract import extract as difference
    from diffgraft.adapters.ops.extract import stated

    tuned, base = str(_path(tuned)), str(_path(base))
    with _weights(tuned) as of_tuned, _weights(base) as of_base:
        assert of_tuned is not None
        assert of_base is not None
        size = _needed(rank, energy)
        said = stated(tuned, base)
        return difference(of_tuned, of_base, size, method, said, str(device_of(device))).adapter


@wrap_system_errors
def merge(
    adapters: Any,
    output: str | Path,
    *,
    base: "str | Path | Base" = "tiny",
    precision: str = "",
    device: str = "cpu",
) -> Path:
    """Write a checkpoint: `base` with adapters merged into its weights.

    Args:
        adapters: a file, a run or an `Adapter`, or several with their strengths, as `graft` takes them.
        output: a name that ends in ``.safetensors`` for one file, any other for a diffusers folder.
        base: what `load_base` takes, or a base, which stays as it is.
        precision: of the checkpoint: ``float32``, ``float16`` or ``bfloat16``; empty: that of the base's files.
        device: where it is computed.

    Raises:
        DiffgraftError: something is there already, or an adapter holds what no weight can.
    """
    from diffgraft.bases import Base, load_base
    from diffgraft.generation.merge_checkpoint import merge_checkpoint

    path = check_new(output)  # before a base is loaded
    place = device_of(device)
    held = base if isinstance(base, Base) else load_base(base, dtype_of(precision, place) if precision else None)
    given = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    return merge_checkpoint(held if isinstance(base, Base) else held.to(place), given, path)


@wrap_system_errors
def inspect(adapter: File, device: str = "cpu") -> "Report":
    """What an adapter holds: method, base, words, and rank, norm and effective rank of every module.

    Raises:
        DiffgraftError: it is no adapter.
    """
    from diffgraft.adapters.ops.inspect import inspect as look

    return look(_loaded(adapter), str(device_of(device)))


@wrap_system_errors
def grid(pictures: Mapping[str, Sequence[Any]] | Sequence[Any]) -> Image.Image:
    """One picture of many: rows under their labels, or a single row without one.

    Args:
        pictures: PIL's pictures or paths of files, those of a row in a list; a mapping gives each row its label.

    Raises:
        DiffgraftError: there are none, a file cannot be read, or something is neither a picture nor a path.
    """
    from diffgraft.generation.plots import grid as sheet

    given = pictures if isinstance(pictures, Mapping) else {"": pictures}
    rows: dict[str, list[Image.Image]] = {}
    for label, row in given.items():
        if isinstance(row, str | PathLike | Image.Image) or not isinstance(row, Iterable):
            kind = type(row).__name__
            raise DiffgraftError(f"Invalid pictures of type {kind}: must be a list of pictures or of paths.")
        rows[str(label)] = [_picture(one) for one in row]
    if not any(rows.values()):
        raise DiffgraftError("There are no pictures to lay out: give at least one.")
    return sheet({label: row for label, row in rows.items() if row})


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    if not isinstance(given, str | PathLike):
        kind = type(given).__name__
        raise DiffgraftError(f"Invalid picture of type {kind}: must be a picture of PIL's or a path.")
    from diffgraft.data.pictures import read_picture

    return read_picture(os.fsdecode(given))


def _path(file: Any) -> Path:
    try:
        return Path(file)
    except TypeError as error:
        raise DiffgraftError(f"{file!r} is no path of a file.") from error


def _loaded(file: Any, weights: "Weights | None" = None) -> Adapter:
    return file if isinstance(file, Adapter) else load_for_base(file, weights)


def _name(file: Any) -> str:
    return f"The {file.method} adapter" if isinstance(file, Adapter) else str(_path(file))


def _size(rank: int | None, energy: float | None) -> RankBudget | None:
    return RankBudget(rank, energy) if rank is not None or energy is not None else None


def _needed(rank: int | None, energy: float | None) -> RankBudget:
    size = _size(rank, energy)
    if size is None:
        raise DiffgraftError("Say how large it may be: rank=8, or energy=0.95.")
    return size


def _weights(base: str | None) -> "AbstractContextManager[Weights | None]":
    if base is None:
        return nullcontext()
    from diffgraft.bases.weights import open_weights

    return open_weights(base)
