"""Settings of any kind and size: taken, or refused in one short sentence, and soon."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

import diffgraft as dg
from diffgraft.adapters.registry import methods
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import _keys
from diffgraft.trainers.recipe.recipe import TASKS
from diffgraft.trainers.run.folder import recipe_with
from tests.recipes import SUBJECT

GROUPS = (
    "options",
    "lr_scale",
    "prior",
    "loss",
    "buckets",
    "tags",
    "validation",
    "concepts",
    "captions",
    "methods",
    "task",
)
ODD = ("options.ranks.unet", "lr_scale.unet", "options.ranks.", "lr_scale.", "options.", ".", "", "a.b.c")
VALUES: tuple[Any, ...] = (
    *("0", "", "x", "1e999", "nan", "[1]", "{}", "1" * 3000, "-1", "1000000", "a|b", "\x00", "null"),
    *(None, {}, [], 5, True, -1, 10**30, [[]], [{}], {"a": 1}, [None], b"x", (1,), float("nan")),
)


@pytest.mark.parametrize("recipe", TASKS)
def test_values_of_any_kind_are_taken_or_refused_in_a_sentence(recipe: str) -> None:
    chance = random.Random(recipe)
    subject = {"subject": "dog"} if recipe == "subject" else {}
    for _ in range(1000):
        method = chance.choice(sorted(methods()))
        options = {f"options.{name}" for name in methods()[method].options.model_fields}
        key = chance.choice(sorted({*_keys(TASKS[recipe]), *options, *GROUPS, *ODD}))
        settings = {**subject, "images": "pictures", "method": method, key: chance.choice(VALUES)}
        said = refusal(recipe, settings)
        assert "\n" not in said, settings
        assert len(said) < 1300, settings


def refusal(recipe: str, settings: dict[str, Any]) -> str:
    """What is said of the settings; empty where they are taken."""
    try:
        recipe_with(recipe, settings)
    except DiffgraftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "setting",
    [
        *("rank", "batch", "resolution", "accumulate", "crops", "repeats", "steps", "warmup", "lr_cycles"),
        *("checkpoint_every", "sample_every", "adapter_every", "prior.images", "validation.pairs", "tags.keep"),
        *("buckets.min", "buckets.max", "buckets.step"),
    ],
)
def test_numbers_beyond_any_machine_are_refused(setting: str) -> None:
    with pytest.raises(DiffgraftError, match=rf"Invalid value {setting}='100000000': must be less than or equal"):
        recipe_with(SUBJECT, {"subject": "dog", "images": "pictures", setting: "100000000"})


def test_the_largest_numbers_are_planned_soon(pictures: Path) -> None:
    started = time.monotonic()
    large = {"batch": "4096", "resolution": "2048", "rank": "8192", "steps": "10000000", "accumulate": "10000"}
    said = str(dg.plan(SUBJECT, images=pictures, subject="dog", **large))
    assert "rank=8192 exceeds 128" in said
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("key", ["images", "base", "output", "init_from"])
def test_names_that_are_too_long_are_told(key: str, pictures: Path) -> None:
    with pytest.raises(DiffgraftError) as caught:
        dg.plan(SUBJECT, **{"images": str(pictures), "subject": "dog", key: "x" * 300 + "/y"})
    assert "\n" not in str(caught.value)
