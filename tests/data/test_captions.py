"""Captions as they come round: tags in another order, some left out, some kept in front, none at all."""

from collections import Counter

import numpy as np

from diffgraft.data.captions import PromptBuilder, is_fixed
from diffgraft.data.settings import Tags

WORDING = PromptBuilder(("one, two, three, four", "a, b"), ("{caption}, sks style", "sks, {caption}"))


def said(tags: Tags, count: int = 400, text: int = 0, dropout: float = 0.0) -> list[str]:
    return [WORDING.prompt(text, tags, dropout, np.random.default_rng([5, place])) for place in range(count)]


def test_what_is_fixed_is_said_as_it_stands() -> None:
    assert set(said(Tags(), 20)) == {"one, two, three, four, sks style"}
    assert set(said(Tags(), 20, 1)) == {"sks, a, b"}
    assert WORDING.prompts() == ["one, two, three, four, sks style", "sks, a, b"]
    assert is_fixed(Tags(keep=2))
    assert not is_fixed(Tags(shuffle=True))
    assert not is_fixed(Tags(drop=0.1))


def test_tags_are_shuffled_but_for_the_first() -> None:
    found = Counter(said(Tags(shuffle=True, keep=1), 600))
    orders = {tuple(text.removesuffix(", sks style").split(", ")) for text in found}
    assert all(order[0] == "one" and sorted(order[1:]) == ["four", "three", "two"] for order in orders)
    assert len(orders) == 6
    assert min(found.values()) > 60


def test_tags_are_dropped_but_for_the_first() -> None:
    found = said(Tags(drop=0.25, keep=2), 2000)
    parts = [text.removesuffix(", sks style").split(", ") for text in found]
    assert all(own[:2] == ["one", "two"] for own in parts)
    share = sum(len(own) - 2 for own in parts) / (2 * len(parts))
    assert abs(share - 0.75) < 0.04


def test_other_separators_and_captions_that_drop_out() -> None:
    wording = PromptBuilder(("one thing. another thing. a third",))
    tags = Tags(shuffle=True, separator=".")
    found = {wording.prompt(0, tags, 0.0, np.random.default_rng(seed)) for seed in range(60)}
    assert len(found) == 6
    assert all(sorted(text.split(". ")) == ["a third", "another thing", "one thing"] for text in found)
    empty = said(Tags(), 2000, dropout=0.3).count("")
    assert abs(empty / 2000 - 0.3) < 0.04


def test_a_trigger_of_several_tags_is_never_dropped() -> None:
    wording = PromptBuilder(("red, sks, on grass, dog",), kept_word="sks, dog")
    for place in range(50):
        parts = wording.prompt(0, Tags(drop=0.9), 0.0, np.random.default_rng([5, place])).split(", ")
        assert {"sks", "dog"} <= set(parts)
