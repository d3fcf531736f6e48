"""What is said of a picture: its captions, their tags in any order, and what is put around them."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffgraft.data.settings import Tags

if TYPE_CHECKING:
    import numpy as np

_LETTER = r"[^\W\u2e80-\ud7ff\uf900-\ufaff]"
"""What a word does not end before; writing without spaces, such as Chinese, has no such letters"""


def mentions(text: str, word: str) -> bool:
    """Whether a text has a word, or several, as words of their own: "sks" is in "a Sks dog" and not in "tusks".

    No word at all is in every text.
    """
    return not word or bool(_as_word(word).search(text))


def without_word(text: str, word: str, more: str = "") -> str:
    """A text without each mention of a word, and of what the pattern `more` finds behind it."""
    return _as_word(word, more).sub("", text)


def _as_word(word: str, more: str = "") -> re.Pattern[str]:
    return re.compile(rf"(?<!{_LETTER}){re.escape(word)}{more}(?!{_LETTER})", re.IGNORECASE)


def lines_of(caption: str, how: str, separator: str = ",") -> tuple[str, ...]:
    """The texts that a caption of several lines stands for: its first line, all of them, or all of them joined."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    if how == "join":
        bare = (line.removesuffix(separator).rstrip() for line in lines)
        return (f"{separator} ".join(line for line in bare if line),) if lines else ()
    return tuple(lines if how == "random" else lines[:1])


@dataclass(frozen=True)
class PromptBuilder:
    """The texts of one picture, and how they become prompts."""

    texts: tuple[str, ...]
    """They take turns"""
    around: tuple[str, ...] = ()
    """For each text what stands around its `{caption}`; none: nothing"""
    kept: str = field(default="", repr=False)
    """The word whose tags are never left out"""

    def prompt(self, number: int, tags: Tags, dropout: float, random: "np.random.Generator") -> str:
        """The prompt made of text `number`, or nothing at all, which comes with the probability `dropout`."""
        if dropout and random.random() < dropout:
            return ""
        return self._around(number, _changed(self.texts[number], tags, self.kept, random))

    def prompts(self) -> list[str]:
        """All prompts, each with its tags as they stand."""
        return [self._around(number, text) for number, text in enumerate(self.texts)]

    def _around(self, number: int, text: str) -> str:
        return self.around[number].replace("{caption}", text) if self.around else text


def is_fixed(tags: Tags) -> bool:
    """Whether each text always makes the same prompt."""
    return not (tags.shuffle or tags.drop)


def _changed(text: str, tags: Tags, kept: str, random: "np.random.Generator") -> str:
    if is_fixed(tags):
        return text
    parts = [part.strip() for part in text.split(tags.separator) if part.strip()]
    first, rest = parts[: tags.keep], parts[tags.keep :]
    if tags.shuffle:
        rest = [rest[place] for place in random.permutation(len(rest))]
    if tags.drop:
        words = [word.strip() for word in kept.split(tags.separator) if word.strip()]  # a trigger may be several tags
        rest = [part for part in rest if random.random() >= tags.drop or any(mentions(part, word) for word in words)]
    return f"{tags.separator} ".join([*first, *rest])
