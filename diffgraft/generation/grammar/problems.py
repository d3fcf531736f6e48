"""Where a prompt is wrong: tags, choices, and what is not read as it looks, each with its place in the text."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffgraft.errors import DiffgraftError
from diffgraft.generation.checks import check_prompt
from diffgraft.generation.grammar.attention import Style
from diffgraft.generation.grammar.choices import draw_choices
from diffgraft.generation.grammar.notes import place_of, remarks_on
from diffgraft.generation.grammar.tags import TAG, split_tags

_CHOICE = re.compile(r"(?<!\\)\{[^{}]*\}")


@dataclass(frozen=True)
class Problem:
    """Something in a prompt that is refused, or not read as it looks."""

    text: str
    """A sentence about it"""
    start: int
    """Place of its first character in the prompt"""
    end: int
    """Place after its last character"""
    is_error: bool
    """Whether the prompt cannot be drawn"""


def problems_of(
    prompt: str, steps: int, style: Style = "webui", find: Callable[[str], object] | None = None
) -> list[Problem]:
    """Return the problems of a prompt, errors first.

    Args:
        prompt: prompt with tags and choices.
        steps: number of steps that it is drawn in.
        style: program whose rules are followed.
        find: finds the adapter of a name, or raises DiffgraftError; None: names are not looked up.
    """
    try:
        check_prompt(prompt)
    except DiffgraftError as error:
        return [Problem(str(error), 0, len(prompt), True)]
    errors = [*_in_tags(prompt, find), *_in_choices(prompt)]
    if errors:
        return errors
    found = []
    for remark in remarks_on(TAG.sub("", prompt), steps, style):
        start, end = place_of(remark.excerpt, prompt)
        found.append(Problem(remark.text, start, end, False))
    return found


def _in_tags(prompt: str, find: Callable[[str], object] | None) -> Iterator[Problem]:
    for match in TAG.finditer(prompt):
        try:
            _, tags = split_tags(match[0])
            if find is not None:
                find(tags[0].name)
        except DiffgraftError as error:
            yield Problem(str(error), match.start(), match.end(), True)


def _in_choices(prompt: str) -> Iterator[Problem]:
    for match in _CHOICE.finditer(prompt):
        try:
            draw_choices(match[0], 0)
        except DiffgraftError as error:
            yield Problem(str(error), match.start(), match.end(), True)
