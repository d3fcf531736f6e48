"""Prompts built from the captions of a picture: tags shuffled and dropped, and templates around them."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffgraft.data.settings import Tags

if TYPE_CHECKING:
    import numpy as np

_LETTER = r"[^\W\u2e80-\ud7ff\uf900-\ufaff]"
"""A letter of scripts that separate words by spaces; words do not begin or end next to one"""


def mentions(text: str, word: str) -> bool:
    """Whether `text` contains `word` (one or several words) as whole words: "sks" is in "a Sks dog", not in "tusks".

    Case is ignored. An empty word is in every text.
    """
    return not word or bool(_whole_word(word).search(text))


def without_word(text: str, word: str, suffix: str = "") -> str:
    """Return `text` with every whole word `word` removed, along with what the pattern `suffix` matches behind it."""
    return _whole_word(word, suffix).sub("", text)


def _whole_word(word: str, suffix: str = "") -> re.Pattern[str]:
    return re.compile(rf"(?<!{_LETTER}){re.escape(word)}{suffix}(?!{_LETTER})", re.IGNORECASE)


def caption_lines(caption: str, lines: str, separator: str = ",") -> tuple[str, ...]:
    """Return the texts of a caption of several lines.

    Args:
        caption: the caption.
        lines: ``first`` for its first line, ``random`` for all lines, ``join`` for all lines joined to one text.
        separator: separator between joined lines.
    """
    texts = [line.strip() for line in caption.splitlines() if line.strip()]
    if lines == "join":
        stripped = (text.removesuffix(separator).rstrip() for text in texts)
        return (f"{separator} ".join(text for text in stripped if text),) if texts else ()
    return tuple(texts if lines == "random" else texts[:1])


@dataclass(frozen=True)
class PromptBuilder:
    """The captions of one picture, and the templates that make prompts of them."""

    texts: tuple[str, ...]
    """Captions, which take turns"""
    templates: tuple[str, ...] = ()
    """Template with `{caption}` for each text; empty: texts are prompts"""
    kept_word: str = field(default="", repr=False)
    """Word whose tags are never dropped"""

    def prompt(self, index: int, tags: Tags, dropout: float, random: "np.random.Generator") -> str:
        """Return the prompt of text `index` with its tags changed, or an empty one with the probability `dropout`."""
        if dropout and random.random() < dropout:
            return ""
        return self._fill_template(index, _shuffle_and_drop(self.texts[index], tags, self.kept_word, random))

    def prompts(self) -> list[str]:
        """Return the prompts of all texts, with their tags unchanged."""
        return [self._fill_template(index, text) for index, text in enumerate(self.texts)]

    def _fill_template(self, index: int, text: str) -> str:
        return self.templates[index].replace("{caption}", text) if self.templates else text


def is_fixed(tags: Tags) -> bool:
    """Whether tags are neither shuffled nor dropped, so that a text always makes the same prompt."""
    return not (tags.shuffle or tags.drop)


def _shuffle_and_drop(text: str, tags: Tags, kept_word: str, random: "np.random.Generator") -> str:
    if is_fixed(tags):
        return text
    parts = [part.strip() for part in text.split(tags.separator) if part.strip()]
    first, rest = parts[: tags.keep], parts[tags.keep :]
    if tags.shuffle:
        rest = [rest[index] for index in random.permutation(len(rest))]
    if tags.drop:
        words = [word.strip() for word in kept_word.split(tags.separator) if word.strip()]  # may be several tags
        rest = [part for part in rest if random.random() >= tags.drop or any(mentions(part, word) for word in words)]
    return f"{tags.separator} ".join([*first, *rest])
