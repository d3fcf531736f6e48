"""Paths that clients name: confined to the folders of the studio, links included."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffgraft.errors import DiffgraftError

_MAX_NAME = 80
_RESERVED = ("uploads", "drawings", "preferences")


class UnknownPathError(DiffgraftError):
    """A file or folder that does not exist, or is outside of the folders of the studio."""


def confined(root: Path, inside: str) -> Path:
    """Return the path of the file or folder `inside` of `root`, with links resolved.

    Raises:
        UnknownPathError: it does not exist, or leads out of `root`.
    """
    try:
        path, top = (root / inside).resolve(), root.resolve()
        if "\0" not in inside and path.is_relative_to(top) and path.exists():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a loop of links, or a zero byte
        pass
    raise UnknownPathError(f"There is no {inside[:200]!r} in the library.")


def within(folders: Sequence[Path], text: str) -> Path:
    """Return the existing path that `text` names: absolute, or relative to one of `folders`, and inside of one.

    Raises:
        UnknownPathError: there is none.
    """
    for folder in folders:
        try:
            return confined(folder, str(Path(text).expanduser()) if text.startswith("~") else text)
        except (UnknownPathError, RuntimeError):
            continue
    names = ", ".join(map(str, folders))
    raise UnknownPathError(
        f"{text[:200]!r} is not in the folders of the studio ({names}). Move it there, or start the studio with "
        "--folder and its folder."
    )


def check_value(folders: Sequence[Path], value: str) -> None:
    """Check the value of a setting of a run, which works in the first of `folders`: paths must be within `folders`.

    Text that names no existing path, such as a prompt or the id of a model on the hub, is not looked at.

    Raises:
        UnknownPathError: `value`, or one of several values between vertical bars, is a path outside of `folders`.
    """
    for part in value.split("|"):
        word = part.strip()
        if not word:
            continue
        leads_away = word.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", word) or Path(word).is_absolute()
        if leads_away or _exists(folders[0] / word):
            within(folders, word)


def safe_name(text: str, fallback: str) -> str:
    """Return a name for a file or folder made of `text`: letters, digits, dots, dashes, at most 80 characters."""
    name = re.sub(r"[^\w.-]+", "-", text.strip()).strip(".-_")[:_MAX_NAME].strip(".-_")
    return name if name and name.lower() not in _RESERVED else fallback


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
