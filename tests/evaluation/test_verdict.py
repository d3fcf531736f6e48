"""Verdicts: pictures of the tiny world in the place of adapters' pictures, and the choice among shares."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffgraft.bases.tiny.world import draw
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, random_scene
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.style import SCREEN_PRINT, words
from diffgraft.demo.subject import ALIEN, LEARN, POODLE, Subject
from diffgraft.errors import DiffgraftError
from diffgraft.evaluation.encoders import Encoders
from diffgraft.evaluation.evidence import Drawings, Evidence, Prompts, Reference
from diffgraft.evaluation.measure import ENCODERS, get_measure
from diffgraft.evaluation.prompts import Words, read_prompts
from diffgraft.evaluation.scoring import Scorer, Scores
from diffgraft.evaluation.verdict import Shares, pareto_front, recommend

SETTINGS = ("snow", "beach", "night")
SEEDS = 4
NAMES = ("clip-i", "patches", "contrast", "structure", "diversity", "drift")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders(dict.fromkeys(ENCODERS, "tiny"))


def drawn(subject: Subject, seed: int, setting: str, own: float, forgets: bool = False) -> Image.Image:
    """A picture of the subject, with the probability `own`, or of another thing of its class at the same seed."""
    rng = np.random.default_rng([seed, 7])
    (scene,) = subject.scenes((str(rng.choice(LEARN)) if forgets else setting,), seed)
    if rng.random() < own:
        return draw(scene, subject.cutout())[0]
    other = random_scene(np.random.default_rng(seed), thing=subject.noun, setting=scene.setting)
    return draw(replace(other, style="flat"))[0]


def rows(
    subject: Subject, seed: int, settings: Sequence[str], own: float, forgets: bool = False
) -> list[list[Image.Image]]:
    places = [[1000 * seed + 100 * row + place for place in range(SEEDS)] for row in range(len(settings))]
    return [
        [drawn(subject, place, setting, own, forgets) for place in seeds]
        for setting, seeds in zip(settings, places, strict=True)
    ]


def prompts_for(subject: Subject) -> Prompts:
    it = [f"a {{trigger}} {{subject}} {SETTING_WORDS[setting][0]}" for setting in SETTINGS]
    return read_prompts(Words("sks", subject.noun), it)


def scored(subject: Subject, seed: int, encoders: Encoders) -> dict[str, Scores]:
    """Scores of what an adapter would draw that has learned too little, well, or by heart."""
    prompts = prompts_for(subject)
    references = [Reference(picture.image) for picture in read_folder(subject.folder / "learn")]
    of_class = SETTINGS[:2]
    bare = Drawings(rows(subject, seed, SETTINGS, 0), rows(subject, seed + 50, of_class, 0))
    start = Evidence(bare, bare, prompts, references, encoders)
    scorer = Scorer([get_measure(name) for name in NAMES], start, is_subject=True)
    planted = {"too little": (0.1, False, 0), "good": (1, False, 0), "by heart": (1, True, 1), "leaks": (1, False, 1)}
    found = {}
    for name, (own, forgets, leaks) in planted.items():
        pictures = Drawings(rows(subject, seed, SETTINGS, own, forgets), rows(subject, seed + 50, of_class, leaks))
        found[name] = scorer.score(replace(start, drawn=pictures))
    return found


@pytest.mark.parametrize("subject", [ALIEN, POODLE], ids=["alien", "poodle"])
def test_planted_pictures_of_a_subject_are_told_apart(subject: Subject, encoders: Encoders) -> None:
    right = 0
    for seed in range(5):
        found = scored(subject, seed, encoders)
        verdicts = {name: scores.shares.verdict for name, scores in found.items()}
        scores = {name: scores.shares.score for name, scores in found.items()}
        expected = {"too little": "too little", "good": "good", "by heart": "overcooked", "leaks": "overcooked"}
        right += verdicts == expected and max(scores, key=lambda name: scores[name]) == "good"
    assert right >= 4


def test_planted_pictures_of_a_style_are_told_apart(encoders: Encoders) -> None:
    listed = (SCREEN_PRINT.held_out[0], *SCREEN_PRINT.learn[1:4])
    prompts = read_prompts(Words("sks"), [f"{words(thing, setting)}, {{trigger}} style" for thing, setting in listed])
    references = [Reference(picture.image) for picture in read_folder(SCREEN_PRINT.folder / "learn")]

    def pictures(seed: int, share: float, forgets: bool = False) -> list[list[Image.Image]]:
        out = []
        for row, (thing, setting) in enumerate(listed):
            out.append([])
            for place in range(SEEDS):
                number = 1000 * seed + 100 * row + place
                rng = np.random.default_rng([number, 3])
                pair = SCREEN_PRINT.learn[int(rng.integers(12))] if forgets else (thing, setting)
                scene = SCREEN_PRINT.scene(*pair, number)
                out[-1].append(SCREEN_PRINT.draw(scene) if rng.random() < share else draw(scene)[0])
        return out

    for seed in range(3):
        of_class = pictures(seed + 50, 0)[:2]
        bare = Drawings(pictures(seed, 0), of_class)
        start = Evidence(bare, bare, prompts, references, encoders)
        scorer = Scorer([get_measure(name) for name in NAMES], start, is_subject=False)
        assert scorer.likeness.name == "clip-i"
        planted = {"too little": (0.1, False), "good": (1, False), "overcooked": (1, True)}
        for verdict, (share, forgets) in planted.items():
            found = scorer.score(replace(start, drawn=Drawings(pictures(seed, share, forgets), of_class)))
            assert found.shares.verdict == verdict, (seed, verdict, found.shares)


def shares(likeness: float, following: float, diversity: float = 1.0, leak: float = 0.0) -> Shares:
    return Shares(likeness, following, diversity, 0.1, leak)


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
        (Shares(0.9, 0.9, 1.0, 3.4, 0.1), "overcooked"),
        (Shares(0.9, 0.3, 1.0, 0.1, 0.1, is_subject=False), "good"),
    ],
)
def test_the_verdict_of_shares(found: Shares, verdict: str) -> None:
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
