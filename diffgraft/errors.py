"""The project's error class, and helpers that phrase messages for users."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from diffgraft.terminal import printable

P = ParamSpec("P")
T = TypeVar("T")

_MAX_LISTED = 20
"""Names that a message lists at most"""
_MAX_VALUE = 80
"""Characters of a value that a message quotes at most"""
_MAX_MESSAGE = 1200
"""Characters of a whole message at most"""


class DiffgraftError(Exception):
    """An error that the user can fix; its message says what is wrong, what was expected and what to do.

    Of a message longer than 1,200 characters only the beginning and the end are kept.
    """

    def __init__(self, text: str = "") -> None:
        is_long = len(text) > _MAX_MESSAGE
        super().__init__(f"{text[: _MAX_MESSAGE // 2]} … {text[-_MAX_MESSAGE // 3 :]}" if is_long else text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; PyTorch raises its own class on GPUs and a RuntimeError on the CPU."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def wrap_system_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate `function` so that OSErrors and out-of-memory errors are raised as a one-sentence `DiffgraftError`."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise DiffgraftError(f"A file or folder cannot be used: {error.strerror or error}{where}.") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DiffgraftError("There is not enough memory. Use a smaller batch, size or resolution.") from error

    return wrapped


def shorten(text: str, max_length: int = 200) -> str:
    """Return `text`, or its first `max_length` characters and "…" if it is longer."""
    return text if len(text) <= max_length else f"{text[:max_length].rstrip()} …"


def short_repr(value: object) -> str:
    """Return the `repr` of a value, cut to its first 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the known word closest to `word`, else all known words or three."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) > _MAX_LISTED:
        return f"the nearest are: {', '.join(difflib.get_close_matches(word, names, 3, 0.0))}."
    return f"known are: {', '.join(names)}."


def one_line(error: BaseException | str, max_length: int = 400) -> str:
    """Return an error's message on one line of at most `max_length` characters; of pydantic's, only the first."""
    if hasattr(error, "errors") and (listed := error.errors()):
        text = f"{'.'.join(map(str, listed[0]['loc'])) or 'it'}: {listed[0]['msg']}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    text = printable(text)
    return text if len(text) <= max_length else f"{text[: max_length * 2 // 3]} … {text[-max_length // 4 :]}"


def check_options(function: str, options: Mapping[str, object], known: type) -> None:
    """Raise DiffgraftError if `options` has a key that the TypedDict `known` lacks; the nearest key is suggested."""
    names = known.__annotations__
    for key in options:
        if key not in names:
            raise DiffgraftError(f"Unknown option {key}= of {function}: {did_you_mean(key, names)}")
