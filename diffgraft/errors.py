"""Errors that are written for the person who meets them."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from diffgraft.terminal import printable

P = ParamSpec("P")
T = TypeVar("T")

_MANY = 20
"""So many names are too many for a sentence"""
_LONG_VALUE = 80
"""Characters of a value that an error quotes"""
_LONGEST = 1200
"""So many characters are too many for an error"""


class DiffgraftError(Exception):
    """Something a person can put right; its text says what was found, what was expected and what to do.

    Of a text that quotes more than a person reads, the beginning and the end are kept.
    """

    def __init__(self, text: str = "") -> None:
        is_long = len(text) > _LONGEST
        super().__init__(f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 3 :]}" if is_long else text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch has a class of its own for GPUs, and a bare RuntimeError for processors."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def wrap_system_errors(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with what the system says of files, folders and memory as a `DiffgraftError`."""

    @wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise DiffgraftError(f"A file or folder cannot be used: {error.strerror or error}{where}.") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            advice = "Take a smaller batch, size or resolution."
            raise DiffgraftError(f"There is not enough memory. {advice}") from error

    return told


def shorten(text: str, longest: int = 200) -> str:
    """A text as it is or, where it is longer than a person reads in a line, its beginning."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"


def short_repr(value: object) -> str:
    """`value` as Python writes it, the beginning of it where it is long."""
    text = repr(value)
    return text if len(text) <= _LONG_VALUE else f"{text[:_LONG_VALUE]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the known word closest to `word`; where none is close, all of few or three of many."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) > _MANY:
        return f"the nearest are: {', '.join(difflib.get_close_matches(word, names, 3, 0.0))}."
    return f"known are: {', '.join(names)}."


def one_line(error: BaseException | str, longest: int = 400) -> str:
    """What an error says, in a line of at most `longest` characters; of pydantic's, its first complaint."""
    if hasattr(error, "errors") and (listed := error.errors()):
        text = f"{'.'.join(map(str, listed[0]['loc'])) or 'it'}: {listed[0]['msg']}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} … {text[-longest // 4 :]}"


def check_options(function: str, given: Mapping[str, object], known: type) -> None:
    """Raise DiffgraftError where `given` has a key that the TypedDict `known` has not; the nearest is named."""
    names = known.__annotations__
    for key in given:
        if key not in names:
            raise DiffgraftError(f"Unknown option {key}= of {function}: {did_you_mean(key, names)}")
