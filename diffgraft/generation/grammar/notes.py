"""Notes on what a prompt says but does not do, so that nothing in it is lost silently."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from diffgraft.generation.grammar.attention import BREAK, Style, read_weights, unclosed_brackets
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.schedule import is_literal, schedule_of, unused_texts

_BRACKET_WITH_NUMBER = re.compile(r"\[[^\[\]]*:\s*[+-]?[\d.]+\s*\]")
_CHANGE = re.compile(r"\[[^\[\]]*(?::[^\[\]]*\d\s*|\|[^\[\]]*)\]")
_KEPT_NUMBER = re.compile(r"[^:]*:\s*[+-]?[\d.,]+\s*$")
_BACKSLASH = re.compile(r"\\(?![()\[\]\\])")
_OTHER_PROGRAM = {
    r"\[[^\[\]]*:[^\[\]]*\d\s*\]|\[[^\[\]]*\|[^\[\]]*\]": "changes between steps",
    r"\bAND\b": "parts",
    r"\bBREAK\b": "breaks",
}
"""Pattern → what it means in webui and not in ComfyUI"""


class Remark(NamedTuple):
    """A sentence about a part of a prompt."""

    text: str
    excerpt: str
    """The part, as the prompt has it; `place_of` finds it"""


def place_of(excerpt: str, prompt: str) -> tuple[int, int]:
    """Return where an excerpt begins and ends in a prompt; the whole prompt if it is not there as it was read."""
    start = prompt.find(excerpt) if excerpt else -1
    return (start, start + len(excerpt)) if start >= 0 else (0, len(prompt))


def notes_on(text: str, steps: int, style: Style = "webui", *, has_second_pass: bool = False) -> Iterator[str]:
    """Yield the sentences of `remarks_on`."""
    yield from (remark.text for remark in remarks_on(text, steps, style, has_second_pass=has_second_pass))


def remarks_on(text: str, steps: int, style: Style = "webui", *, has_second_pass: bool = False) -> Iterator[Remark]:
    """Yield a remark for each thing in a prompt that is not read as it looks.

    Args:
        text: prompt without tags and choices.
        steps: number of steps that it is drawn in.
        style: program whose rules are followed.
        has_second_pass: whether a hires fix follows, in which later changes count.
    """
    if style == "comfyui":
        for pattern, what in _OTHER_PROGRAM.items():
            if match := re.search(pattern, text):
                yield Remark(
                    f"{match[0]} is drawn as text: ComfyUI's grammar has no {what}. Use that of webui for them.",
                    match[0],
                )
        return
    if match := _BACKSLASH.search(text.replace("\\\\", "  ")):
        end = text[match.start() : match.start() + 10]
        yield Remark(f"The backslash of {end} is dropped: write two for one, or one before a bracket.", end)
    for part in split_parts(text):
        changes = [] if has_second_pass else [*_notes_on_changes(part.text, steps)]
        yield from changes
        told: set[Remark] = set()
        if changes and is_literal(part.text):
            continue
        for stage in schedule_of(part.text, steps):
            told |= {*_notes_on_weights(stage.text)}
        yield from sorted(told)


def _notes_on_changes(text: str, steps: int) -> Iterator[Remark]:
    """Yield remarks on changes between steps that change nothing."""
    if is_literal(text):
        if match := _CHANGE.search(text):
            yield Remark(
                f"{match[0]} is drawn as text, because the prompt has a | outside of [a|b], or ends with a backslash: "
                "remove that.",
                match[0],
            )
        return
    for source, words in unused_texts(text, steps):
        yield Remark(
            f"{source} never draws {words!r} in {steps} steps; for a weight, use round brackets: ({words}:1.2).", words
        )


def _notes_on_weights(text: str) -> Iterator[Remark]:
    """Yield remarks on brackets in the text of one step."""
    if changes := _BRACKET_WITH_NUMBER.search(text):
        yield Remark(
            f"{changes[0]} is drawn as text: a change between steps is [before:after:0.5] or [added:0.5].", changes[0]
        )
    for piece in read_weights(text):
        if piece.text == BREAK.text and not piece.is_break:
            yield Remark(
                "BREAK in brackets is drawn as a word and breaks nothing: close the brackets before it.", BREAK.text
            )
        elif piece.weight != 1 and not changes and (match := _KEPT_NUMBER.search(piece.text)):
            yield Remark(
                f"The number of {match[0].strip()!r} is drawn as text: a weight is (words:1.2), with a point.",
                match[0].strip(),
            )
    if places := unclosed_brackets(text):
        yield Remark(
            f"A bracket in {text.strip()!r} is never closed, so its weight reaches to the end: close it.",
            text[places[-1] :].rstrip(),
        )
