"""Writing files so that nothing half-written ever has the final name."""

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
"""What names begin with while something is not whole yet, or no longer: a killed process may leave such"""


def cache_folder() -> Path:
    """Where what can be made again is kept: ``DIFFGRAFT_CACHE``, or ``~/.cache/diffgraft``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffgraft"
    return Path(os.environ.get("DIFFGRAFT_CACHE", default)).expanduser()


def check_folder(folder: Path) -> None:
    """See whether files can be written into `folder`, or it can be made; nothing is.

    Raises:
        NotADirectoryError, PermissionError: they cannot, or it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def check_new(path: str | Path) -> Path:
    """The path of a file or folder that is to be made, once it is sure that nothing is there and it can be made.

    Raises:
        DiffgraftError: something is there already.
        NotADirectoryError, PermissionError: nothing can be written there.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise DiffgraftError(f"{path} is there already. Choose another name, or remove it.")
    check_folder(path.parent)
    return path


@contextmanager
def atomic_write(path: Path, size: int = 0) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not.

    It is on the disk before it has the name, so that not even a power cut leaves half a file there.

    Raises:
        DiskFullError: there is no room, for `size` bytes where that is known.
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
    """The same for a folder with all that is in it."""
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
    """Delete a folder, or what has its name, if it is there: it loses its name before it loses what it holds."""
    if folder.exists():
        going = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        folder.rename(going / folder.name)
        shutil.rmtree(going)


def remove_partials(folder: Path) -> None:
    """Remove what a killed process left half-written below `folder`; nobody else may be writing there."""
    for left in list(folder.rglob(f"{PARTIAL}*")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or which files a folder holds, is on the disk; Windows does not know this of folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone; a process that dies gives it free.

    Raises:
        DiffgraftError: another process has it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # which stays there: whoever removed it could let two in
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DiffgraftError(
            f"Another process is at work in {folder}. Wait for it, or choose another output=…"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def write_safetensors(path: Path, tensors: "Mapping[str, Tensor]", header: Mapping[str, str]) -> Path:
    """Write tensors and a header of strings, whole or not at all; equal content is equal bytes."""
    from safetensors.torch import save_file  # brings torch, which other files are written without

    with atomic_write(path, sum(value.nbytes for value in tensors.values())) as partial:
        save_file(unshared_contiguous(tensors), partial, dict(header))
        _sort_header(partial)
    return path


def check_suffix(path: Path) -> None:
    """Raises DiffgraftError where a safetensors file would have a name that tells tools it is something else."""
    if path.suffix != ".safetensors":
        raise DiffgraftError(f"{path.name} would be a safetensors file: give {path.with_suffix('.safetensors').name}.")


def unshared_contiguous(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """`tensors` by name in order, each in plain order and none in another's memory: safetensors refuses all else."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in sorted(tensors.items()):
        found[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        found[name] = found[name].contiguous()
        seen.add(value.untyped_storage().data_ptr())
    return found


def _sort_header(path: Path) -> None:
    """Put the header's strings in order, in place: the library writes them in an order that changes with every process.

    A file opens with the length of its JSON header, eight bytes, least significant first; spaces may end the header.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(content.pop("__metadata__", {}).items())), **content}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # always, but for characters the two libraries escape differently
            file.seek(8)
            file.write(text.ljust(length))


def unique_path(path: Path) -> Path:
    """`path`, or where something is there already, the same name with the first free number behind it."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
