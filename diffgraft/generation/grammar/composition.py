"""Prompts in parts: ``a cat AND a dog :0.5``, of which each part gets a prediction of its own.

Composable diffusion, Liu et al. 2022, arXiv:2206.01714, equation 11, as in webui.
"""

import re
from typing import NamedTuple

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")


class Part(NamedTuple):
    """One part of a composed prompt."""

    text: str
    weight: float
    """Weight of its difference to the prediction for the negative prompt"""


def split_parts(prompt: str) -> list[Part]:
    """Split at the word ``AND``; a number behind a colon at the end of a part is its weight, 1 without one.

    Only capitals split, and only a whole word: ``BRAND`` does not. An empty part is kept, as webui keeps it.
    """
    parts = []
    for text in _AND.split(prompt):
        number = _WEIGHT.search(text)
        parts.append(Part(text[: number.start()], float(number[1])) if number else Part(text.rstrip(), 1.0))
    return parts
