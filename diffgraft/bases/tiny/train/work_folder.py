"""Command lines and work folders of the trainings: options, stored files, and errors as sentences."""

import argparse
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffgraft.disk import format_bytes
from diffgraft.errors import DiffgraftError, wrap_system_errors
from diffgraft.files import atomic_write

_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError)
"""Errors of PyTorch and NumPy for damaged files"""


def training_parser(module: str, description: str | None, work: str, output: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that all trainings have; `output` is where the trained part ships."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for pictures, caches, checkpoints")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder or file to write [default: {output.name} of the package; of a dry run: WORK]",
    )
    parser.add_argument("--dry-run", action="store_true", help="two steps of every stage on a handful of pictures")
    return parser


def positive(text: str) -> int:
    """Read an option that must be a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def prepare(options: argparse.Namespace, output: Path, *, is_folder: bool = True) -> tuple[Path, Path]:
    """Create the work folder, and return it and the output; that of a dry run is in the work folder by default.

    Raises:
        DiffgraftError: the output exists and is of another kind, so that hours of training could not be written.
    """
    work: Path = options.work
    target: Path = options.output or (work / f"dry-{output.name}" if options.dry_run else output)
    if target.exists() and target.is_dir() != is_folder:
        kinds = ("file", "folder") if is_folder else ("folder", "file")
        raise DiffgraftError(f"--output={target} is a {kinds[0]}: give the path of a {kinds[1]}.")
    work.mkdir(parents=True, exist_ok=True)
    return work, target


def with_sentences(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the `main` of a training so that an error is a sentence, and ends the process with status 1."""

    @wraps(main)
    def told(arguments: Sequence[str] | None = None) -> None:
        try:
            wrap_system_errors(main)(arguments)
        except DiffgraftError as error:
            sys.exit(f"error: {error}")

    return told


def write_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """Write tensors, and what they are nested in, to a file that gets its name when it is whole."""
    with atomic_write(path) as partial:
        try:
            torch.save(dict(values), partial)
        except RuntimeError as error:  # of PyTorch, for a disk that is full or a file that may not be as large
            free = format_bytes(shutil.disk_usage(path.parent).free)
            raise DiffgraftError(
                f"{path} cannot be written ({free} are free): make room on its disk, and run the command again, which "
                "goes on from the last whole checkpoint."
            ) from error


def read_tensors(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read a file of `write_tensors`, which must have these names.

    Raises:
        DiffgraftError: it is damaged, or another file.
    """
    try:
        with warnings.catch_warnings():  # of pickles that are not PyTorch's, which are refused
            warnings.simplefilter("ignore")
            stored: dict[str, Any] = torch.load(path, weights_only=True)
        if not isinstance(stored, dict) or not {*names} <= stored.keys():
            raise ValueError
    except _UNREADABLE as error:
        raise damaged(path) from error
    return stored


def read_pictures(path: Path, count: int) -> np.ndarray:
    """Return stored pictures, uint8 [count, 64, 64, 3], without reading them all into memory.

    Raises:
        DiffgraftError: the file is damaged, or has other pictures.
    """
    try:
        stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.shape != (count, 64, 64, 3) or stored.dtype != np.uint8:
            raise ValueError
    except _UNREADABLE as error:
        raise damaged(path) from error
    return stored


def damaged(path: Path) -> DiffgraftError:
    """Return the error for a damaged file of a work folder."""
    return DiffgraftError(
        f"{path} is damaged, or is not a file of this training: delete it, and run the command again."
    )
