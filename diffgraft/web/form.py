"""The form of a recipe: its keys with defaults and meanings, from the schema, the common ones first."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from diffgraft.adapters.listing import method_summaries
from diffgraft.trainers.recipe.files import described_keys
from diffgraft.trainers.recipe.recipe import TASKS

COMMON = ("subject", "trigger", "base", "method", "steps", "rank", "lr", "batch", "resolution", "seed")
"""Keys that most runs set, in this order; the others are folded away"""
_ELSEWHERE = ("images", "output", "concepts")
"""Keys that the page sets itself, or that a flat form cannot hold"""
Kind = Literal["flag", "choice", "number", "text"]


@dataclass(frozen=True)
class Field:
    """A recipe key in the form: name, description, default and kind of input."""

    key: str
    value: str
    """Default, as text"""
    meaning: str
    kind: Kind
    choices: tuple[str, ...] = ()
    """Values of a choice; the empty one leaves the key unset"""
    is_common: bool = False


@cache
def fields_of(recipe: str) -> tuple[Field, ...]:
    """Return the fields of the form of a recipe that ships.

    Raises:
        DiffgraftError: there is no such recipe.
    """
    rows = [row for row in described_keys(recipe) if row[0].partition(".")[0] not in _ELSEWHERE]
    fields = [_field(key, value, meaning) for key, value, meaning in rows]
    places = {key: place for place, key in enumerate(COMMON)}
    return tuple(sorted(fields, key=lambda field: places.get(field.key, len(places))))


def _field(key: str, value: str, meaning: str) -> Field:
    kind, choices = _kind(key)
    return Field(key, value, meaning, kind, choices, key in COMMON)


def _kind(key: str) -> tuple[Kind, tuple[str, ...]]:
    if key == "method":
        return "choice", tuple(method_summaries())
    annotation = next((found for task in TASKS.values() if (found := _annotation(task, key)) is not None), None)
    inner, can_be_unset = _without_none(annotation)
    if inner is bool:
        return ("choice", ("", "true", "false")) if can_be_unset else ("flag", ())
    if get_origin(inner) is Literal:
        words = tuple(str(word) for word in get_args(inner) if word is not None)
        return "choice", (("", *words) if can_be_unset else words)
    return ("number" if inner in (int, float) else "text"), ()


def _annotation(model: type[BaseModel], key: str) -> Any:
    """Return the type of a key, nested with dots; None if the model does not have it."""
    name, _, rest = key.partition(".")
    if name not in model.model_fields:
        return None
    annotation = model.model_fields[name].annotation
    if not rest:
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _annotation(annotation, rest)
    return None


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether it had it."""
    if get_origin(annotation) is Literal:
        return annotation, None in get_args(annotation)
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        kept = [part for part in get_args(annotation) if part is not type(None)]
        return (kept[0] if len(kept) == 1 else None), type(None) in get_args(annotation)
    return annotation, False


def grouped(fields: tuple[Field, ...]) -> Mapping[str, list[Field]]:
    """Return the fields that are not common by the first word of their key; single keys are together under ``""``."""
    groups: dict[str, list[Field]] = {"": []}
    for field in fields:
        if not field.is_common:
            name, dot, _ = field.key.partition(".")
            groups.setdefault(name if dot else "", []).append(field)
    return groups
