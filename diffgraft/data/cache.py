"""Files of the cache: tensors with a checksum, which is verified when they are read.

The cache saves time and is not required: damaged entries are computed again, and if it cannot be written (a full or
read-only disk), training continues without it.
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
    """Read tensors by name; None if the file does not exist, or its checksum does not match."""
    try:
        if not file.is_file():  # opening a pipe would block
            return None
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return tensors if (opened.metadata() or {}).get(_SUM) == checksum(tensors) else None
    except (OSError, SafetensorError):
        return None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], source: str) -> bool:
    """Write tensors to `file` with their checksum and `source`, a text that says what they were computed from.

    Returns:
        Whether they were written; False, after a warning, where the file cannot be written.
    """
    on_cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with optional_write() as written:
        write_safetensors(file, on_cpu, {"of": source, _SUM: checksum(on_cpu)})
        written.append(file)
    return bool(written)


@contextmanager
def optional_write() -> Iterator[list[Path]]:
    """Turn errors of writing to the cache within the block into a warning.

    The block appends the files it has written to the list that is yielded.
    """
    written: list[Path] = []
    try:
        yield written
    except (OSError, SafetensorError, DiskFullError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        warnings.warn(
            f"The cache {cache_folder()} cannot be written ({reason}); its content will be computed again next time.",
            stacklevel=3,
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
