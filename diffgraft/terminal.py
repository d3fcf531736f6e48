"""Text for terminals and logs."""

import unicodedata

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Unicode's marks of direction, which show letters in another order than they have (Unicode Standard Annex 9)"""


def printable(text: object) -> str:
    """`text` on one line, with what a terminal would act upon written out, as Python does in strings.

    Captions, headers, file names and settings may come from anybody, and a terminal takes control characters in them
    for commands: to fill the clipboard, to set the window's title, or to forge a line of output.
    """
    return "".join(_written_out(char) if _is_steering(char) else char for char in str(text))


def _is_steering(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTIONS


def _written_out(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
