"""Weights of words: ``(a red dog:1.2)``, nested brackets, escapes and ``BREAK``.

webui multiplies the weights of nested brackets, ComfyUI replaces those of outer brackets by explicit inner ones.
"""

import math
import re
from typing import Literal, NamedTuple

Style = Literal["webui", "comfyui"]
"""Program whose rules are followed"""

_ROUND, _SQUARE = 1.1, 1 / 1.1
"""Factors of ``(…)`` and ``[…]`` without a number"""
_TOKEN = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)          # an escaped bracket or backslash; any other backslash is dropped
      | :\s*(?P<weight>[+-]?[.\d]+)\s*\)     # a number that closes a round bracket
      | (?P<bracket>[()\[\]])
      | (?P<text>[^\\()\[\]:]+|:)""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Piece(NamedTuple):
    """A part of a prompt with one weight."""

    text: str
    weight: float

    @property
    def is_break(self) -> bool:
        """Whether the piece is ``BREAK``, after which the text goes on in the next chunk of tokens.

        In brackets ``BREAK`` has another weight than -1 and is the word BREAK, as in webui.
        """
        return self == BREAK


BREAK = Piece("BREAK", -1.0)
"""The piece that a ``BREAK`` outside of brackets becomes"""


def read_weights(text: str, style: Style = "webui") -> list[Piece]:
    """Split a text at the brackets of weights; neighbours of equal weight are joined.

    Args:
        text: text of one step, without tags.
        style: program whose rules are followed.

    Returns:
        The pieces in order, at least one.
    """
    return _webui(text) if style == "webui" else _comfyui(text)


def _webui(text: str) -> list[Piece]:
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    """Bracket → number of the first piece in each one that is open"""

    def close(bracket: str, factor: float) -> None:
        for number in range(opened[bracket].pop(), len(weights)):
            weights[number] *= factor

    for token in _TOKEN.finditer(text):
        bracket, number = token["bracket"], as_number(token["weight"])
        if token["escaped"] is not None:
            texts.append(token["escaped"])
            weights.append(1.0)
        elif bracket in opened:
            opened[bracket].append(len(texts))
        elif number is not None and opened["("]:
            close("(", number)
        elif bracket == ")" and opened["("]:
            close("(", _ROUND)
        elif bracket == "]" and opened["["]:
            close("[", _SQUARE)
        else:
            for place, part in enumerate(_BREAK.split(token[0])):
                if place:
                    texts.append(BREAK.text)
                    weights.append(BREAK.weight)
                texts.append(part)
                weights.append(1.0)
    for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):
        while opened[bracket]:  # an unclosed bracket reaches to the end
            close(bracket, factor)
    return _joined([Piece(*piece) for piece in zip(texts, weights, strict=True)])


def unclosed_brackets(text: str) -> list[int]:
    """Return the places of the brackets that are opened and never closed, by webui's rules."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(text):
        bracket = token["bracket"]
        if bracket in opened:
            opened[bracket].append(token.start())
        elif bracket == "]":
            del opened["["][-1:]
        elif bracket == ")" or as_number(token["weight"]) is not None:
            del opened["("][-1:]
    return sorted([*opened["("], *opened["["]])


def _comfyui(text: str) -> list[Piece]:
    """Follow ``token_weights`` of ComfyUI, which escapes round brackets alone."""
    pieces: list[Piece] = []
    waiting = [(part, 1.0) for part in reversed(_groups(text.replace("\\(", "\0").replace("\\)", "\1")))]
    while waiting:
        part, weight = waiting.pop()
        if not (part.startswith("(") and part.endswith(")") and len(part) > 1):
            pieces.append(Piece(part.replace("\0", "(").replace("\1", ")"), weight))
            continue
        inside, colon, last = part[1:-1].rpartition(":")
        number = as_number(last) if colon and inside else None
        inside, weight = (part[1:-1], weight * _ROUND) if number is None else (inside, number)
        waiting += [(inner, weight) for inner in reversed(_groups(inside))]
    return _joined(pieces)


def _groups(text: str) -> list[str]:
    """Split at the outermost round brackets, which stay on their groups; brackets without a partner are text."""
    groups, start, depth = [], 0, 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0 and place > start:
                groups.append(text[start:place])
                start = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                groups.append(text[start : place + 1])
                start = place + 1
    return [*groups, text[start:]] if start < len(text) else groups


def as_number(text: str | None) -> float | None:
    """Return `text` as a finite number; None if it is None, or no such number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of equal weight; a `BREAK` stays alone."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight and not piece.is_break and not joined[-1].is_break:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined or [Piece("", 1.0)]
