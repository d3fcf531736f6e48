"""Text that is safe to print to terminals and logs."""

import unicodedata

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Unicode's directional marks, which change the order in which letters are shown (Unicode Standard Annex 9)"""


def printable(text: object) -> str:
    """Return `text` on one line, with control characters escaped as in Python strings.

    Captions, headers, file names and settings may come from anywhere, and control characters in them would command the
    terminal: to fill the clipboard, to set the window's title, or to forge a line of output.
    """
    return "".join(_escaped(char) if _is_control(char) else char for char in str(text))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
