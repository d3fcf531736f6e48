"""Verdicts: pictures of the tiny world in the place of adapters' pictures, and the choice among shares."""

import math

import pytest

from benchmarks.planted import is_right, planted_shares, targets
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evidence import Prompts
from diffgraft.evaluation.measure import ENCODERS
from diffgraft.evaluation.prompts import Words, read_prompts
from diffgraft.evaluation.verdict import Outcome, pareto_front, recommend


@pytest.mark.parametrize("target", targets())
def test_planted_pictures_are_told_apart(target: str) -> None:
    encoders = Encoders(dict.fromkeys(ENCODERS, "tiny"))
    found = [planted_shares(target, seed, encoders) for seed in range(3)]
    assert sum(map(is_right, found)) >= 2, found


def shares(likeness: float, following: float, diversity: float = 1.0, leak: float = 0.0) -> Outcome:
    return Outcome(likeness, following, diversity, 0.1, leak)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (shares(0.1, 1.0), "too little"),
        (shares(0.8, 0.9), "good"),
        (shares(0.8, 0.9, math.nan, math.nan), "good"),
        (shares(1.4, 0.2), "overcooked"),
        (shares(0.1, 0.1), "overcooked"),
        (shares(0.9, 0.9, diversity=0.02), "overcooked"),
        (shares(0.9, 0.9, leak=0.95), "overcooked"),
        (shares(0.1, 0.9, leak=3.0), "too little"),
        (shares(0.9, math.nan), "good"),
        (Outcome(0.9, 0.9, 1.0, 3.4, 0.1), "overcooked"),
        (Outcome(0.9, 0.3, 1.0, 0.1, 0.1, is_subject=False), "good"),
    ],
)
def test_the_verdict_of_shares(found: Outcome, verdict: str) -> None:
    assert found.verdict == verdict


def test_the_recommended_one_is_the_best_balance_of_the_good_ones() -> None:
    found = [shares(0.1, 1.0), shares(0.6, 1.0), shares(0.9, 0.9), shares(1.5, 0.45), shares(1.0, 0.95, leak=0.9)]
    names = [f"step {step} at 1" for step in range(5)]
    choice = recommend(names, [1.0] * 5, found)
    assert choice.index == 2
    assert choice.reason.startswith("step 2 at 1 reaches 90 % of the likeness")
    assert "2 good ones" in choice.reason
    tied = [shares(1.19, 1.0), shares(1.3, 1.0), shares(1.25, 0.99), shares(1.0, 1.0)]
    assert recommend(names[:4], [0.8, 1.4, 1.1, 1.0], tied).index == 2
    unread = recommend(["final at 1"], [1.0], [shares(0.9, math.nan)])
    assert (
        unread.reason == "final at 1 reaches 90 % of the likeness that your pictures have to one another; it is the "
        "only good one."
    )
    none = recommend(names[:1], [1.0], found[:1])
    assert none.index == 0
    assert "None is good" in none.reason
    assert "too little" in none.reason


def test_the_front_has_what_nothing_exceeds() -> None:
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.5), (0.5, 0.6), (0.9, 0.1), (0.5, 0.6), (0.05, 0.2)]
    found = pareto_front(points)
    assert found == [0, 3, 4]


@pytest.mark.parametrize(
    ("words_", "prompt", "plain"),
    [
        (Words("sks", "dog"), "a sks dog in the snow", "a dog in the snow"),
        (Words("sks", "dog"), "a SKS, oil painting", "a dog, oil painting"),
        (Words("sks"), "a house, sks style, at night", "a house, at night"),
        (Words("<new>", "cat"), "a <new> on the beach", "a cat on the beach"),
        (Words("ohwx man", ""), "photo of ohwx man", "photo of"),
    ],
)
def test_prompts_without_their_trigger(words_: Words, prompt: str, plain: str) -> None:
    assert words_.plain(prompt) == plain


def test_prompts_are_sorted_by_the_trigger() -> None:
    found = read_prompts(Words("sks", "dog"), ["a {trigger} {subject}", "a {subject}", "a sks dog ", "", "tusks"])
    assert found == Prompts(("a sks dog",), ("a dog",), ("a dog", "tusks"))
    assert read_prompts(Words("sks", "dog"), ["a sks dog at night"]).of_class == ("a dog at night",)
    with pytest.raises(DiffgraftError, match="None of the 1 prompts mentions the trigger 'sks'"):
        read_prompts(Words("sks", "dog"), ["a dog"])
