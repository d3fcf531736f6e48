"""Texts that change between steps: ``[before:after:0.5]``, ``[added:5]``, ``[removed::5]`` and ``[a|b]``."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)\s*\]")
_MOST = 10**6
"""Steps and shares beyond it count as it"""


class Stage(NamedTuple):
    """What a prompt says up to one step."""

    until: int
    """Last step of the stage, counted from 1"""
    text: str


@dataclass(frozen=True)
class _Change:
    """``[before:after:when]``."""

    before: "_Prompt"
    after: "_Prompt"
    when: str


@dataclass(frozen=True)
class _Alternation:
    """``[a|b|…]``, one of them in each step."""

    options: "tuple[_Prompt, ...]"


_Prompt = tuple[str | _Change | _Alternation, ...]
_Parsed = tuple[_Prompt, int]
"""What was read, and where it ends"""


def schedule_of(prompt: str, steps: int, first_pass: int | None = None) -> list[Stage]:
    """Return what a prompt says in each stage of `steps` steps.

    A number with a point is a share of the steps, one without is the last step of what stands before. A bracket that is
    no change stays text, and a whole prompt is text if it has a ``|`` outside of ``[a|b]`` or ends with a backslash.

    Args:
        prompt: one part of a prompt, without tags.
        steps: number of steps.
        first_pass: for the second pass of a hires fix, the number of steps of the first; numbers then count on from
            it, and shares from 1 to 2.

    Returns:
        The stages in order; the last one ends with the last step.
    """
    read = _read(prompt)
    if read is None:
        return [Stage(steps, prompt)]

    def step_of(when: str) -> int:
        value = float(when)
        if first_pass is not None:
            value -= 1 if "." in when else first_pass
        return int(max(-_MOST, min(value * (steps if "." in when else 1), steps)))

    ends = {steps}
    for node in _nodes(read):
        if isinstance(node, _Alternation):
            ends |= set(range(1, steps + 1))
        elif isinstance(node, _Change) and step_of(node.when) >= 1:
            ends.add(step_of(node.when))
    return [Stage(step, _text(read, step, step_of)) for step in sorted(ends)]


def is_literal(prompt: str) -> bool:
    """Whether the whole prompt is text, as it has a ``|`` outside of ``[a|b]`` or a backslash at its end."""
    return _read(prompt) is None


def unused_texts(prompt: str, steps: int) -> Iterator[tuple[str, str]]:
    """Yield each prompt edit ``[a:b:when]`` of which ``a`` or ``b`` is in none of the steps.

    Yields:
        The words "The change at ‹when›", and the words that are in no step.
    """
    read = _read(prompt)
    for node in _nodes(read or ()):
        if not isinstance(node, _Change):
            continue
        value = float(node.when) * (steps if "." in node.when else 1)
        lost = node.after if value >= steps else node.before if value < 1 else ()
        if words := "".join(word for word in _nodes(lost) if isinstance(word, str)).strip():
            yield f"The change at {node.when}", words


def _nodes(prompt: _Prompt) -> Iterator[str | _Change | _Alternation]:
    """Yield all nodes of a prompt, those inside of others too."""
    waiting = [prompt]
    while waiting:
        for node in waiting.pop():
            yield node
            if isinstance(node, _Change):
                waiting += [node.before, node.after]
            elif isinstance(node, _Alternation):
                waiting += node.options


def _text(prompt: _Prompt, step: int, step_of: Callable[[str], int]) -> str:
    """Return what a prompt says in a step."""
    text: list[str] = []
    waiting = [iter(prompt)]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
        elif isinstance(node, str):
            text.append(node)
        elif isinstance(node, _Change):
            waiting.append(iter(node.before if step <= step_of(node.when) else node.after))
        else:
            waiting.append(iter(node.options[(step - 1) % len(node.options)]))
    return "".join(text)


@lru_cache(maxsize=256)
def _read(text: str) -> _Prompt | None:
    """Read a prompt; None if it can only be text.

    Brackets are read from the last to the first, so that those inside are known and no nesting is too deep.
    """
    groups: dict[int, _Parsed | None] = {}
    for place in range(len(text) - 1, -1, -1):
        if text[place] in "([" and not _is_escaped(text, place):
            groups[place] = _group(text, place, groups)
    read: list[_Prompt] = []
    place = 0
    while True:
        inside, place = _prompt(text, place, groups)
        read.append(inside)
        if place == len(text):
            return tuple(chain.from_iterable(read))
        if text[place] in "|\\":
            return None
        read.append((text[place],))  # a bracket without a partner, or a colon
        place += 1


def _is_escaped(text: str, place: int) -> bool:
    start = place
    while start and text[start - 1] == "\\":
        start -= 1
    return (place - start) % 2 == 1


def _prompt(text: str, place: int, groups: dict[int, _Parsed | None]) -> _Parsed:
    """Read plain text and groups from `place` to the first character that is neither."""
    read: list[_Prompt] = []
    while place < len(text):
        if plain := _PLAIN.match(text, place):
            read.append((plain[0],))
            place = plain.end()
        elif group := groups.get(place):
            read.append(group[0])
            place = group[1]
        else:
            break
    return tuple(chain.from_iterable(read)), place


def _group(text: str, place: int, groups: dict[int, _Parsed | None]) -> _Parsed | None:
    """Read the group that the bracket at `place` opens; None if it opens none."""
    first, end = _prompt(text, place + 1, groups)
    after = text[end : end + 1]
    if text[place] == "(":
        if after == ":":
            second, end = _prompt(text, end + 1, groups)
            first = (*first, ":", *second)
        return (("(", *first, ")"), end + 1) if text[end : end + 1] == ")" else None
    if after == "]":
        return ("[", *first, "]"), end + 1
    if after == "|":
        options = [first]
        while text[end : end + 1] == "|":
            option, end = _prompt(text, end + 1, groups)
            options.append(option)
        return ((_Alternation(tuple(options)),), end + 1) if text[end : end + 1] == "]" else None
    if after == ":":
        if number := _NUMBER.match(text, end + 1):
            return (_Change((), first, number[1]),), number.end()
        second, end = _prompt(text, end + 1, groups)
        if text[end : end + 1] == ":" and (number := _NUMBER.match(text, end + 1)):
            return (_Change(first, second, number[1]),), number.end()
    return None
