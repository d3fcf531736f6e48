"""Writing files so that nothing half-written ever has the final name."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from diffgraft.errors import DiffgraftError


def cache_folder() -> Path:
    """Where what can be made again is kept: ``DIFFGRAFT_CACHE``, or ``~/.cache/diffgraft``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "diffgraft"
    return Path(os.environ.get("DIFFGRAFT_CACHE", default)).expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
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
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write tensors and a header of strings, whole or not at all; equal content is equal bytes."""
    with replacing(path) as partial:
        save_file(apart(tensors), partial, dict(header))
        _sort_header(partial)
    return path


def check_suffix(path: Path) -> None:
    """Raises DiffgraftError where a safetensors file would have a name that tells tools it is something else."""
    if path.suffix != ".safetensors":
        raise DiffgraftError(f"{path.name} would be a safetensors file: give {path.with_suffix('.safetensors').name}.")


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` by name in order, none sharing its memory with another, which safetensors refuses."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in sorted(tensors.items()):
        found[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
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


def unused(path: Path) -> Path:
    """`path`, or where something is there already, the same name with the first free number behind it."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
