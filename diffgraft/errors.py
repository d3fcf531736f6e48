"""Errors that are written for the person who meets them."""

import difflib
from collections.abc import Iterable


class DiffgraftError(Exception):
    """Something a person can put right; its text says what was found, what was expected and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the known word closest to `word`, or all known words where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}."
