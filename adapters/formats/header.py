"""What the headers of adapter files have in common: strings, some of which are JSON."""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats.reader import STEM
from diffgraft.adapters.training_metadata import read_training
from diffgraft.errors import one_line

OURS = "diffgraft"
"""The key under which every file of ours, in any dialect, tells about itself."""
FOREIGN = "foreign"
"""The key of an adapter's metadata under which stands what the headers of other tools say, word for word."""
_PLAIN = re.compile(r"[\w.\\]*")
_KNOWN = (OURS, STEM, "format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")


class _OfBase(BaseModel):
    """What our entry says of the base."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = ""
    family: str | None = None
    hash: str = ""
    prediction_type: str | None = None


class _Ours(BaseModel):
    """The types of what our entry says, as far as anything reads it."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    method: str | None = None
    trigger: str | None = None
    rank: int | None = None
    alpha: Annotated[float, Field(allow_inf_nan=False)] | None = None
    base: _OfBase | str | None = None
    recipe: dict[str, Any] | None = None
    foreign: dict[str, str] | None = None
    dora: str | None = None


def read_metadata(header: Mapping[str, str], **otherwise: Any) -> dict[str, Any]:
    """What a header says of its adapter: our entry, or what is known `otherwise` and what other tools wrote there."""
    if OURS in header:
        return read_json(header, OURS)
    foreign = {key: value for key, value in header.items() if key not in _KNOWN}
    return {**otherwise, **read_training(header), **({FOREIGN: foreign} if foreign else {})}


def read_json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object under `key`; empty where there is none. Raises ValueError where it is something else."""
    value = parsed(header, key, "{}")
    if not isinstance(value, dict):
        raise ValueError(f"its header entry {key!r} holds no JSON object")
    if key == OURS:
        try:
            _Ours.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"its header entry {key!r} has something else where it says {one_line(error)}") from error
    return value


def parsed(header: Mapping[str, str], key: str, otherwise: str = "null") -> Any:
    """The JSON under `key`, or what is there `otherwise`. Raises ValueError where it cannot be read."""
    try:
        return json.loads(header.get(key, otherwise))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header entry {key!r} is no JSON ({one_line(error, 100)})") from error


def write_ours(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata as the entry `OURS`."""
    return {OURS: json.dumps(dict(adapter.metadata), sort_keys=True)} if adapter.metadata else {}


def of_pattern(patterns: Any, path: str, otherwise: Any) -> Any:
    """What peft's configuration has for a layer: the value of the pattern that its path ends in.

    Patterns are regular expressions there, of which only paths are read: a file could make others take for ever.

    Raises:
        ValueError: there is another pattern, or something else in the place of patterns.
    """
    if not isinstance(patterns or {}, dict):
        raise ValueError(f"its configuration has {patterns!r} where a value for each layer belongs")
    for pattern, value in (patterns or {}).items():
        if not _PLAIN.fullmatch(pattern):
            raise ValueError(
                f"the configuration has the pattern {pattern!r}, a regular expression; only plain paths are read"
            )
        plain = pattern.replace("\\.", ".").removeprefix("text_model.")
        if path.removeprefix("text_model.") == plain or path.endswith(f".{plain}"):
            return value
    return otherwise


def number(value: Any, what: str = "alpha") -> float:
    """`value` as a float. Raises ValueError where it is no finite number; `what` names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its {what} is {one_line(repr(value), 80)}, which is no finite number")
    return float(value)
