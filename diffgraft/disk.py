"""Full disks: one error class, with a message that says how much space is needed and free."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffgraft.errors import DiffgraftError

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers for a full device and for an exceeded quota"""


class DiskFullError(DiffgraftError):
    """A file could not be written because the disk is full; an earlier file of the name is still there."""


@contextmanager
def full_disk_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Raise DiskFullError for errors of a full disk within the block.

    Args:
        path: file or folder that the block writes.
        size: its size in bytes, about; 0 if it is not known.

    Raises:
        DiskFullError: the disk or the user's quota is full; the message says how much is needed and how much is free.
    """
    try:
        yield
    except (OSError, SafetensorError, DiskFullError) as error:
        if not _is_disk_full(error) or (isinstance(error, DiskFullError) and not size):
            raise
        existing = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = format_bytes(shutil.disk_usage(existing).free)
        needed = f"needs about {format_bytes(size)}" if size else "could not be written"
        raise DiskFullError(f"The disk is full: {path} {needed}, and {free} are free. Free up space.") from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    match = re.search(r"os error (\d+)", str(error))  # the wording of safetensors
    return isinstance(error, DiskFullError) or (match is not None and int(match[1]) in _FULL)


def format_bytes(count: float) -> str:
    """Format a number of bytes, such as "1.5 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
