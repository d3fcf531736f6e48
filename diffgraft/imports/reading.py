"""Reading of other tools' configurations from TOML, JSON or YAML; nothing in them is executed."""

import json
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from diffgraft.errors import DiffgraftError, one_line


def read_config(path: Path) -> Any:
    """Content of a TOML, JSON or YAML file: a mapping or, in the latter two, a list.

    Raises:
        DiffgraftError: the file does not exist, or cannot be parsed.
    """
    if not path.is_file():
        raise DiffgraftError(f"There is no file {path}. Give a configuration in a .toml, .json or .yaml file.")
    try:
        text = read_text(path)
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if path.suffix.lower() in (".json", ".yaml", ".yml"):
            config = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
            if isinstance(config, dict | list):
                return config
            raise DiffgraftError(f"{path} holds {str(config)[:80]}, but a configuration needs keys and values.")
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f" (line {at.line + 1}, column {at.column + 1})" if at else ""
        what = one_line(error.problem or error.context or "it cannot be parsed", 200)
        raise DiffgraftError(f"{path} cannot be read as YAML{where}: {what}.") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        kind = path.suffix.lstrip(".").upper()
        raise DiffgraftError(f"{path} cannot be read as {kind}: {one_line(error, 200).rstrip('.')}.") from error
    raise DiffgraftError(f"{path} is not a configuration, whose name ends in .toml, .json or .yaml.")


def read_text(path: Path) -> str:
    """Content of a text file.

    Raises:
        DiffgraftError: it is not UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def find_file(name: str, config: Path) -> Path | None:
    """Find a file or folder named by a configuration, relative to it or the working directory; None if missing."""
    with suppress(OSError, ValueError, RuntimeError):  # not a valid path
        relative = Path(name).expanduser()
        for path in (relative, config.parent / relative):
            if name and path.exists():
                return path
    return None
