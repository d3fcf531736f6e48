"""Atomic files and folders: a file appears under its name only when it is complete."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffgraft.disk import full_disk_errors
from diffgraft.errors import DiffgraftError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"
"""Prefix of names of incomplete files and folders; a killed process may leave some behind"""


def cache_folder() -> Path:
    """Return the folder of the cache: ``DIFFGRAFT_CACHE``, or ``~/.cache/diffgraft``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffgraft"
    return Path(os.environ.get("DIFFGRAFT_CACHE", default)).expanduser()


def check_folder(folder: Path) -> None:
    """Check that files can be written into `folder`, or that it can be created; it is not created.

    Raises:
        NotADirectoryError: `folder`, or the nearest parent that exists, is a file.
        PermissionError: it is not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def check_new(path: str | Path) -> Path:
    """Check that a file or folder can be created at `path`, and return the path with ``~`` expanded.

    Raises:
        DiffgraftError: `path` exists.
        NotADirectoryError, PermissionError: nothing can be written into its folder.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise DiffgraftError(f"{path} already exists. Choose another name, or remove it.")
    check_folder(path.parent)
    return path


@contextmanager
def atomic_write(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` if the block succeeds and is removed if it fails.

    The file is flushed to the disk before it gets its name, so that not even a power cut leaves half a file.

    Args:
        path: path of the file.
        size: its size in bytes, for the message of a full disk; 0 if it is not known.

    Raises:
        DiskFullError: the disk is full.
    """
    with full_disk_errors(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{PARTIAL}{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` if the block succeeds, as `atomic_write` does."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with full_disk_errors(path, size):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            fsync(partial)
            remove_dir(path)
            partial.rename(path)
            fsync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_dir(folder: Path) -> None:
    """Delete a folder, or a file of that name, if it exists; it is renamed first, so that it vanishes at once."""
    if folder.exists():
        trash = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        folder.rename(trash / folder.name)
        shutil.rmtree(trash)


def remove_partials(folder: Path) -> None:
    """Remove incomplete files below `folder` that killed processes left; no other process may be writing there."""
    for path in list(folder.rglob(f"{PARTIAL}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; Windows does not support this for folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process within the block, creating it if needed; the lock ends if the process dies.

    Raises:
        DiffgraftError: another process holds the lock.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # the file is not removed, as that could let two processes in
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DiffgraftError(f"Another process is using {folder}. Wait for it, or choose another output=…") from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> Path:
    """Write `text` to a file as UTF-8, atomically, and return the path."""
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def write_safetensors(path: Path, tensors: "Mapping[str, Tensor]", header: Mapping[str, str]) -> Path:
    """Write tensors and a header to a safetensors file, atomically; equal content gives equal bytes."""
    from safetensors.torch import save_file  # imports torch, which the other functions do not need

    with atomic_write(path, sum(value.nbytes for value in tensors.values())) as partial:
        save_file(unshared_contiguous(tensors), partial, dict(header))
        _sort_header(partial)
    return path


def check_suffix(path: Path) -> None:
    """Raise DiffgraftError if the name of a safetensors file does not end in ``.safetensors``."""
    if path.suffix != ".safetensors":
        fixed = path.with_suffix(".safetensors").name
        raise DiffgraftError(f"Invalid file name {path.name}: the file has the safetensors format, so call it {fixed}.")


def unshared_contiguous(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return `tensors` sorted by name, contiguous and with no shared memory, as safetensors requires."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, value in sorted(tensors.items()):
        unshared[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        unshared[name] = unshared[name].contiguous()
        seen.add(value.untyped_storage().data_ptr())
    return unshared


def _sort_header(path: Path) -> None:
    """Sort the header's strings in place; the library writes them in an order that differs between processes.

    A file begins with the length of its JSON header, as eight bytes in little-endian order; the header may be padded
    with spaces.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(content.pop("__metadata__", {}).items())), **content}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # always, except with characters that the two libraries escape differently
            file.seek(8)
            file.write(text.ljust(length))


def unique_path(path: Path) -> Path:
    """Return `path`, or if it exists, the name with the first free number appended: "name-2", "name-3" and so on."""
    number, candidate = 2, path
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate
