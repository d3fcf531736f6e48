"""Errors that are written for the person who meets them."""

import difflib
from collections.abc import Iterable

_MANY = 20
"""So many names are too many for a sentence"""


class DiffgraftError(Exception):
    """Something a person can put right; its text says what was found, what was expected and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the known word closest to `word`; where none is close, all of few or three of many."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) > _MANY:
        return f"the nearest are: {', '.join(difflib.get_close_matches(word, names, 3, 0.0))}."
    return f"known are: {', '.join(names)}."
