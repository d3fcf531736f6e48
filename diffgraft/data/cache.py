"""Files of the cache: tensors with a checksum, read only if they are what was written, and never needed.

A cache saves time and is not required: what is damaged in it is computed again, and where it cannot be written (a full
or read-only disk) training goes on without.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.disk import DiskFullError
from diffgraft.files import cache_folder, write_safetensors

_SUM = "sha256"


def read_tensors(file: Path) -> dict[str, Tensor] | None:
    """Tensors by name; None where there is no such file, or it is not what was written."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return None
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return found if (opened.metadata() or {}).get(_SUM) == checksum(found) else None
    except (OSError, SafetensorError):
        return None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], of: str) -> bool:
    """Write tensors with their checksum, and what they are computed `of`; whether the cache took them."""
    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with optional_write() as done:
        write_safetensors(file, held, {"of": of, _SUM: checksum(held)})
        done.append(file)
    return bool(done)


@contextmanager
def optional_write() -> Iterator[list[Path]]:
    """A block that writes into the cache; where that fails a warning is given and the block is left.

    The block appends the files it has written to the list.
    """
    written: list[Path] = []
    try:
        yield written
    except (OSError, SafetensorError, DiskFullError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        warnings.warn(
            f"The cache {cache_folder()} cannot be written ({reason}): what it would keep is computed again next time.",
            stacklevel=3,
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
