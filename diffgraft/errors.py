"""Errors that are written for the person who meets them."""

import difflib
import unicodedata
from collections.abc import Iterable


class DiffgraftError(Exception):
    """Something a person can put right; its text says what was found, what was expected and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the known word closest to `word`, or all known words where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}."


def one_line(error: BaseException | str, longest: int = 400) -> str:
    """What an error says, in a line of at most `longest` characters; of pydantic's, its first complaint."""
    if hasattr(error, "errors") and (listed := error.errors()):
        text = f"{'.'.join(map(str, listed[0]['loc'])) or 'it'}: {listed[0]['msg']}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} … {text[-longest // 4 :]}"


def printable(text: object, *, breaks: bool = False) -> str:
    """Text of foreign origin as it may reach a terminal: what would steer it, or turn its order, is spelled out.

    Control characters could set the clipboard, the window's title, or forge lines (with `breaks`, line breaks stay);
    marks of direction show letters in another order than they have.
    """
    kept = "\t\n" if breaks else "\t"
    return "".join(char if char in kept or not _steers(char) else _spelled(char) for char in str(text))


def _steers(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONS


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Unicode's marks of direction (Unicode Standard Annex 9)"""
