"""The broad world: things by name, made-up subjects, and subjects that stay held back."""

import numpy as np
import pytest

from diffgraft.bases.tiny.world import SETTINGS, THINGS
from diffgraft.bases.tiny.world.broad import NAMED_CREATURES, Sample, nouns, random_sample
from diffgraft.bases.tiny.world.creatures import creature, noun_of
from diffgraft.bases.tiny.world.glyphs import HELD_BACK, HELD_BACK_FOR_TESTS, glyph_names, glyph_sprite
from diffgraft.bases.tiny.world.things import CELL, KEPT_BACK

WORDS = [f"word{number}" for number in range(NAMED_CREATURES + 40)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [random_sample(np.random.default_rng([3, number]), WORDS) for number in range(1500)]


def test_hundreds_of_things_have_names_of_at_most_three_words() -> None:
    names = glyph_names()
    assert len(names) > 600
    assert all(1 <= len(name.split()) <= 3 and name == name.lower() for name in names)
    assert not set(names) & set(THINGS)


def test_held_back_subjects_are_shown_by_no_name() -> None:
    shown = {glyph for glyphs in (*glyph_names().values(), *THINGS.values()) for glyph in glyphs}
    held_back = [subject.glyph for subject in (*HELD_BACK.values(), *HELD_BACK_FOR_TESTS.values())]
    assert len(set(held_back)) == len(HELD_BACK) + len(HELD_BACK_FOR_TESTS) >= 12
    assert not set(HELD_BACK) & set(HELD_BACK_FOR_TESTS)
    assert len(HELD_BACK_FOR_TESTS) >= len(held_back) / 2
    assert not shown & {*held_back, *KEPT_BACK}
    for subject in (*HELD_BACK.values(), *HELD_BACK_FOR_TESTS.values()):
        alpha = np.asarray(glyph_sprite(subject.glyph).getchannel("A"))
        assert alpha.shape == (CELL, CELL)
        assert 0.1 < (alpha > 127).mean() < 0.9
        assert subject.noun in THINGS


@pytest.mark.parametrize("number", range(12))
def test_a_made_up_subject_is_a_function_of_its_number(number: int) -> None:
    noun, cutout = creature(number)
    again, same = creature(number)
    assert noun == again == noun_of(number)
    assert noun in nouns()
    assert np.array_equal(np.asarray(cutout), np.asarray(same))
    assert 0.08 < (np.asarray(cutout.getchannel("A")) > 127).mean() < 0.95


def test_made_up_subjects_differ_in_outline() -> None:
    masks = [np.asarray(creature(number)[1].getchannel("A")) > 127 for number in range(20)]
    for first in range(20):
        for second in range(first):
            union = (masks[first] | masks[second]).sum()
            assert (masks[first] & masks[second]).sum() / union < 0.95


def test_shares_of_the_three_kinds(samples: list[Sample]) -> None:
    own = np.mean([sample.creature is None and sample.scene.thing in THINGS for sample in samples])
    made_up = np.mean([sample.creature is not None for sample in samples])
    assert 0.45 < own < 0.55
    assert 0.2 < made_up < 0.3
    assert {sample.scene.setting for sample in samples} == set(SETTINGS)


def test_a_word_of_its_own_always_means_the_same_subject(samples: list[Sample]) -> None:
    named = [sample for sample in samples if sample.creature is not None and sample.creature < NAMED_CREATURES]
    assert len(named) > 100
    assert all(sample.rare == WORDS[sample.creature or 0] for sample in named)
    free = {sample.rare for sample in samples if sample not in named} - {""}
    assert free <= set(WORDS[NAMED_CREATURES:])


def test_captions_name_what_is_drawn(samples: list[Sample]) -> None:
    for number, sample in enumerate(samples[:60]):
        text = sample.caption(np.random.default_rng(number))
        words = [word for word in (sample.rare, sample.scene.colour, sample.scene.thing) if word]
        assert " ".join(words) in text
        assert sample.scene.thing in nouns()
        assert sample.draw().size == (64, 64)
