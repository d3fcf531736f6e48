"""Checks of values that users give to settings of drawing, with a sentence for each that will not do."""

from collections.abc import Sequence
from functools import cache
from operator import index
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffgraft.errors import DiffgraftError, short_repr

MOST_SEED = 2**63 - 1
MOST_CHARACTERS = 10_000
"""Length of a prompt at most: nested brackets take time and memory with the square of their depth"""


def checked(owner: type, name: str, value: Any) -> Any:
    """Return a value as the type of a dataclass's field; numbers of numpy become those of Python.

    Raises:
        DiffgraftError: the value has another type.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        return _adapter(owner, name).validate_python(value)
    except ValidationError as error:
        wanted = _described(get_type_hints(owner)[name])
        raise DiffgraftError(f"Invalid value {name}={short_repr(value)}: must be {wanted}.") from error


def _described(hint: Any) -> str:
    """Return what a type's values are, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "(width, height)"}
    kinds = [
        own for own in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if own is not NoneType
    ]
    return words.get(get_origin(kinds[0]) or kinds[0], "a mapping of words to numbers")


@cache
def _adapter(owner: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(owner)[name], config=ConfigDict(arbitrary_types_allowed=True))


def check_fields(item: Any, names: Sequence[str]) -> None:
    """Replace the values of a frozen dataclass's fields by `checked` ones."""
    for name in names:
        object.__setattr__(item, name, checked(type(item), name, getattr(item, name)))


def checked_seeds(seeds: Any) -> list[int]:
    """Return seeds as numbers of Python.

    Raises:
        DiffgraftError: one is no whole number from 0 to 2⁶³ − 1.
    """
    try:
        found = [index(seed) for seed in seeds]
    except TypeError:
        raise DiffgraftError(f"Invalid seeds {short_repr(seeds)}: must be whole numbers, such as [1, 2].") from None
    for seed in found:
        if not 0 <= seed <= MOST_SEED:
            raise DiffgraftError(f"Invalid value seed={seed}: must be 0 to {MOST_SEED}.")
    return found


def check_prompt(prompt: Any) -> None:
    """Raise DiffgraftError if a prompt is no text, too long, or has characters that no encoding can write."""
    if not isinstance(prompt, str):
        raise DiffgraftError(f"Invalid prompt {short_repr(prompt)}: must be a text.")
    if len(prompt) > MOST_CHARACTERS:
        raise DiffgraftError(f"The prompt has {len(prompt)} characters: at most {MOST_CHARACTERS} are read.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DiffgraftError(
            f"The prompt has characters that are no text ({error.reason}): write it in UTF-8."
        ) from None
