"""Prompts of an evaluation: those of the recipe's samples, or the lines of a file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffgraft.data.captions import mentions, without_word
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.evidence import Prompts

_MOST_OF_CLASS = 2
"""Prompts of the class that are drawn for each adapter, where they are not given"""


@dataclass(frozen=True)
class Words:
    """Trigger and class noun that an adapter was trained with."""

    trigger: str
    noun: str = ""
    """Class noun; empty for styles"""

    def plain(self, prompt: str) -> str:
        """Return a prompt without the trigger: ``a sks dog, oil painting`` becomes ``a dog, oil painting``.

        A trigger that stands alone for the subject becomes the class noun, and ``, sks style`` goes with its comma.
        """
        text = prompt
        if self.noun and not mentions(text, self.noun):
            text = re.sub(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", self.noun, text, flags=re.IGNORECASE)
        text = without_word(text, self.trigger, "( style)?")
        parts = (" ".join(part.split()) for part in text.split(","))
        return ", ".join(part for part in parts if part)


def read_prompts(words: Words, listed: Sequence[str]) -> Prompts:
    """Sort prompts into those with the trigger and those without it, which are of the class.

    Without prompts of the class, the first prompts are taken without the trigger.

    Raises:
        DiffgraftError: no prompt mentions the trigger.
    """
    texts = [text.replace("{trigger}", words.trigger).replace("{subject}", words.noun) for text in listed]
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    trained = [text for text in texts if words.trigger and mentions(text, words.trigger)]
    if not trained:
        raise DiffgraftError(
            f"None of the {len(texts)} prompts mentions the trigger {words.trigger!r} of the adapter: write it into "
            "those that are to show what was learned."
        )
    plain = [words.plain(text) or words.noun or "a picture" for text in trained]
    of_class = [text for text in texts if text not in trained and text.strip()]
    if not of_class:
        of_class = list(dict.fromkeys(plain))[:_MOST_OF_CLASS]
    return Prompts(tuple(trained), tuple(plain), tuple(of_class))
