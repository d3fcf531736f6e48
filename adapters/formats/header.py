"""Headers of adapter files: strings by key, some of which are JSON."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats.reader import FILE_STEM
from diffgraft.adapters.rank_schedule import RankSchedule
from diffgraft.adapters.training_metadata import read_training
from diffgraft.bases.layers import is_of_text
from diffgraft.errors import one_line

DIFFGRAFT_KEY = "diffgraft"
"""Header key of the adapter's metadata, in all dialects that this project writes"""
FOREIGN = "foreign"
"""Metadata key that keeps the header entries of other tools, verbatim"""
RANK_SCHEDULE = "rank_schedule"
"""Metadata key of a T-LoRA's `RankSchedule`; written from the LoRAs themselves"""
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
    """Header entry with the adapter's metadata; empty if it has none.

    Raises:
        ValueError: LoRAs of the adapter differ in how many ranks act at a timestep.
    """
    metadata = {key: value for key, value in adapter.metadata.items() if key != RANK_SCHEDULE}
    if (schedule := rank_schedule(adapter)) is not None:
        metadata[RANK_SCHEDULE] = schedule.model_dump()
    # settings keep the order of the recipe, in which they are shown, and by which the last of several patterns counts
    return {DIFFGRAFT_KEY: json.dumps({key: metadata[key] for key in sorted(metadata)})} if metadata else {}


def rank_schedule(adapter: Adapter) -> RankSchedule | None:
    """The schedule that all LoRAs of the denoiser have; None if none of them has one.

    Raises:
        ValueError: they have different schedules, or only some have one.
    """
    loras = [
        delta for path, deltas in adapter.deltas.items() for delta in deltas if delta.is_lora and not is_of_text(path)
    ]
    schedules = {delta.rank_schedule for delta in loras}
    if len(schedules) > 1:
        raise ValueError("its LoRAs differ in how many ranks act at a timestep, and a file holds one such schedule")
    return next(iter(schedules), None)


def with_rank_schedule(adapter: Adapter) -> Adapter:
    """Give the LoRAs of the denoiser the schedule in the metadata, if there is one.

    Raises:
        ValueError: the schedule is invalid.
    """
    if RANK_SCHEDULE not in adapter.metadata:
        return adapter
    schedule = RankSchedule.from_json(adapter.metadata[RANK_SCHEDULE])
    deltas = {
        path: tuple(
            replace(delta, rank_schedule=schedule)
            if isinstance(delta, FactorDelta) and delta.is_lora and not is_of_text(path)
            else delta
            for delta in module_deltas
        )
        for path, module_deltas in adapter.deltas.items()
    }
    return replace(adapter, deltas=deltas)


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
