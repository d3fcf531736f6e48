"""What is said of a picture: its captions, their tags in any order, and what is put around them."""

from dataclasses import dataclass

import numpy as np

from diffgraft.data.settings import Tags


@dataclass(frozen=True)
class Wording:
    """The texts of one picture, and how they become prompts."""

    texts: tuple[str, ...]
    """They take turns"""
    around: tuple[str, ...] = ()
    """For each text what stands around its `{caption}`; none: nothing"""

    def prompt(self, number: int, tags: Tags, dropout: float, random: np.random.Generator) -> str:
        """The prompt made of text `number`, or nothing at all, which comes with the probability `dropout`."""
        if dropout and random.random() < dropout:
            return ""
        return self._around(number, _changed(self.texts[number], tags, random))

    def prompts(self) -> list[str]:
        """All prompts, each with its tags as they stand."""
        return [self._around(number, text) for number, text in enumerate(self.texts)]

    def _around(self, number: int, text: str) -> str:
        return self.around[number].replace("{caption}", text) if self.around else text


def is_fixed(tags: Tags) -> bool:
    """Whether each text always makes the same prompt."""
    return not (tags.shuffle or tags.drop)


def _changed(text: str, tags: Tags, random: np.random.Generator) -> str:
    if is_fixed(tags):
        return text
    parts = [part.strip() for part in text.split(tags.separator) if part.strip()]
    first, rest = parts[: tags.keep], parts[tags.keep :]
    if tags.shuffle:
        rest = [rest[place] for place in random.permutation(len(rest))]
    if tags.drop:
        rest = [part for part in rest if random.random() >= tags.drop]
    return f"{tags.separator} ".join([*first, *rest])
