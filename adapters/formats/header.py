"""Headers of adapter files: strings by key, some of which are JSON."""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats.reader import FILE_STEM
from diffgraft.adapters.training_metadata import read_training
from diffgraft.errors import one_line

DIFFGRAFT_KEY = "diffgraft"
"""Header key of the adapter's metadata, in all dialects that this project writes"""
FOREIGN = "foreign"
"""Metadata key that keeps the header entries of other tools, verbatim"""
_PLAIN_PATH = re.compile(r"[\w.\\]*")
_OWN_KEYS = (DIFFGRAFT_KEY, FILE_STEM, "format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")


class _BaseEntry(BaseModel):
    """Types of the metadata entry ``base``."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = ""
    family: str | None = None
    hash: str = ""
    prediction_type: str | None = None


class _Metadata(BaseModel):
    """Types of the metadata entries that are read anywhere."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    method: str | None = None
    trigger: str | None = None
    rank: int | None = None
    alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    base: _BaseEntry | str | None = None
    recipe: dict[str, Any] | None = None
    foreign: dict[str, str] | None = None
    dora: str | None = None


def read_metadata(header: Mapping[str, str], **inferred: Any) -> dict[str, Any]:
    """Metadata from a header: the project's own entry, else `inferred` values and the entries of other tools."""
    if DIFFGRAFT_KEY in header:
        return read_json(header, DIFFGRAFT_KEY)
    foreign = {key: value for key, value in header.items() if key not in _OWN_KEYS}
    return {**inferred, **read_training(header), **({FOREIGN: foreign} if foreign else {})}


def read_json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    """Parse the JSON object under `key`; empty if the key is missing. Raises ValueError if it is not an object."""
    value = parse_json(header, key, "{}")
    if not isinstance(value, dict):
        raise ValueError(f"its header entry {key!r} is not a JSON object")
    if key == DIFFGRAFT_KEY:
        try:
            _Metadata.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"its header entry {key!r} has an invalid value: {one_line(error)}") from error
    return value


def parse_json(header: Mapping[str, str], key: str, default: str = "null") -> Any:
    """Parse the JSON under `key`, or `default` if the key is missing. Raises ValueError for invalid JSON."""
    try:
        return json.loads(header.get(key, default))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header entry {key!r} is not valid JSON ({one_line(error, 100)})") from error


def write_metadata(adapter: Adapter) -> dict[str, str]:
    """Header entry with the adapter's metadata; empty if it has none."""
    return {DIFFGRAFT_KEY: json.dumps(dict(adapter.metadata), sort_keys=True)} if adapter.metadata else {}


def pattern_value(patterns: Any, path: str, default: Any) -> Any:
    """Value for the layer at `path` in a pattern mapping of peft's configuration: that of a pattern the path ends in.

    peft's patterns are regular expressions. Only plain paths are accepted, as a file could contain a regular expression
    that takes forever to match.

    Raises:
        ValueError: a pattern is not a plain path, or `patterns` is not a mapping.
    """
    if not isinstance(patterns or {}, dict):
        raise ValueError(f"its configuration has {patterns!r}; expected a mapping from layer paths to values")
    for pattern, value in (patterns or {}).items():
        if not _PLAIN_PATH.fullmatch(pattern):
            raise ValueError(
                f"its configuration has the regular expression {pattern!r}; only plain module paths are supported"
            )
        plain = pattern.replace("\\.", ".").removeprefix("text_model.")
        if path.removeprefix("text_model.") == plain or path.endswith(f".{plain}"):
            return value
    return default


def finite_number(value: Any, name: str = "alpha") -> float:
    """Convert `value` to a float. Raises ValueError, with `name` in the message, if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its {name} is {one_line(repr(value), 80)}; expected a finite number")
    return float(value)
