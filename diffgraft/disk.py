"""A disk that is full, told so that a person can make room."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffgraft.errors import DiffgraftError

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""No space left on the device, or none left to this user"""


class DiskFullError(DiffgraftError):
    """Something could not be written for want of room; what was there before is still there."""


@contextmanager
def full_disk_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Within the block `path` is written, a file or a folder of about `size` bytes (0: not known).

    Raises:
        DiskFullError: the disk, or the person's share of it, is full; it says what was needed, and what is free.
    """
    try:
        yield
    except (OSError, SafetensorError, DiskFullError) as error:
        if not _is_of_a_full_disk(error) or (isinstance(error, DiskFullError) and not size):
            raise
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = format_bytes(shutil.disk_usage(there).free)
        needed = f"needs about {format_bytes(size)}" if size else "could not be written"
        raise DiskFullError(f"The disk is full: {path} {needed}, and its disk has {free} left. Make room.") from error


def _is_of_a_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    told = re.search(r"os error (\d+)", str(error))  # as safetensors says it
    return isinstance(error, DiskFullError) or (told is not None and int(told[1]) in _FULL)


def format_bytes(count: float) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
