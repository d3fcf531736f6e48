"""Configurations of other tools, read from TOML or JSON; nothing in them is ever run."""

import json
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError


def read_config(path: Path) -> Any:
    """What a TOML or JSON file holds: a mapping or, in JSON, a list.

    Raises:
        DiffgraftError: there is no such file, or it cannot be read as its name says.
    """
    if not path.is_file():
        raise DiffgraftError(f"There is no configuration {path}. Give a .toml or .json file.")
    try:
        text = read_text(path)
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if path.suffix.lower() == ".json":
            found = json.loads(text)
            if isinstance(found, dict | list):
                return found
            raise DiffgraftError(f"{path} holds {str(found)[:80]}, where a configuration has keys and values.")
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DiffgraftError(f"{path} cannot be read as {path.suffix.lstrip('.').upper()}: {error}.") from error
    raise DiffgraftError(f"{path} is called neither .toml nor .json, as configurations are.")


def read_text(path: Path) -> str:
    """What a text file says.

    Raises:
        DiffgraftError: it is not written in UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{path} is not written in UTF-8 ({error.reason}). Save it as UTF-8.") from error


def beside(named: str, config: Path) -> Path | None:
    """The file or folder that a configuration names, from here or from where the configuration lies, if it exists."""
    with suppress(OSError, ValueError, RuntimeError):  # no name that a file may have
        given = Path(named).expanduser()
        for path in (given, config.parent / given):
            if named and path.exists():
                return path
    return None
