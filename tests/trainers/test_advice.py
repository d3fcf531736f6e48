"""What seldom trains well is told by `plan`, and by `train` before it starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffgraft as dg
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.planning.estimate import Cost
from diffgraft.trainers.run.folder import read_prompts, recipe_with
from tests.cli.test_cli import call
from tests.recipes import SUBJECT


@pytest.fixture(autouse=True)
def _cost_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is another file's matter, and takes most of the time of a plan."""
    cost = Cost(trained=3, stored=3, entries=2, weights=7, waiting=0, training=5, activations=4, step=1.0, image=1.0)
    monkeypatch.setattr("diffgraft.trainers.planning.plan.estimate_cost", lambda *_, **__: cost)


def plan(images: Any, recipe: str = "subject", **settings: Any) -> str:
    subject = {"subject": "dog"} if recipe == "subject" else {}
    return str(dg.plan(recipe, images=images, **{**subject, **settings}))


def test_usual_settings_are_not_advised_against(pictures: Path) -> None:
    said = plan(pictures)
    for word in (
        "far more than",
        "no more than rank",
        "there is one image",
        "trigger is empty",
        "a toy of",
        "backdrop",
    ):
        assert word not in said


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"lr": "10"}, "lr=10.0 is far too large for optimizer=adamw"),
        ({"lr": "0.1"}, "lr=0.1 is far too large for optimizer=adamw"),
        (
            {"lr": "5", "optimizer": "prodigy"},
            "finds by lr=5.0, which is too large: set lr=1",
        ),
        ({"validation.share": "0.4", "validation.every": "9000"}, "validation runs only after the last step"),
        ({"rank": "500"}, "rank=500 exceeds 128"),
        ({"trigger": ""}, "the trigger is empty"),
        ({"resolution": "128"}, "resolution=128 is 2 times this base's resolution of 64 pixels"),
    ],
)
def test_settings_far_from_any_that_work(pictures: Path, settings: dict[str, str], answer: str) -> None:
    assert answer in plan(pictures, **settings)


def test_prodigy_s_rate_and_a_word_s_rank_are_their_own(pictures: Path) -> None:
    assert "far too large" not in plan(pictures, lr="1", optimizer="prodigy")
    assert "exceeds" not in plan(pictures, "concept", trigger="<zorp>")


def test_pictures_that_are_learnt_from_do_not_validate(pictures: Path) -> None:
    said = plan(
        pictures, **{"validation.images": str(pictures), "validation.share": 0.4, "prior.folder": str(pictures)}
    )
    assert "5 images of validation.images are also training images" in said
    assert "validation.share does nothing with validation.images" in said
    assert "prior.folder is the folder of the training images" in said


def test_one_picture_and_a_style_without_captions(pictures: Path) -> None:
    first = sorted(pictures.glob("*.png"))[:1]
    said = plan(first)
    assert "there is one image" in said
    assert "0 of 1 image; 1 prompt, such as: a sks dog" in said
    assert "400, of 4 images each: 1,600 epochs of 1\n" in said
    assert "400, of 1 image each: 1 epoch of 400\n" in plan(first, batch=1, repeats=400)
    assert "no image has a caption" in plan(pictures, "style")


def test_captions_are_advised_where_they_are_read(tmp_path: Path) -> None:
    """A slider learns the axis that its recipe names, or its pairs, and not what pictures show."""
    for folder in (tmp_path, tmp_path / "negative"):
        folder.mkdir(exist_ok=True)
        for number in range(3):
            Image.new("RGB", (64, 64), (80 * number, 9, len(folder.name))).save(folder / f"{number}.png")
    for recipe, settings in (("picture-slider", {}), ("slider", {"prompt": ""})):
        said = plan(tmp_path, recipe, **settings)
        assert "no image has a caption" not in said
        assert "all prompts are empty" not in said
    assert "all prompts are empty" in plan(tmp_path, "style", prompt="", trigger="")


def test_triggers_that_folders_give_are_no_settings_of_the_recipe(tmp_path: Path) -> None:
    for number, name in enumerate(("10_ohwx man", "5_zwx man")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), (number, 99, 0)).save(tmp_path / name / "a.png")
    said = plan(tmp_path, subject="man")
    assert "ohwx, zwx" in said
    assert "is of no concept" not in said


def test_photographs_on_the_toy_base(pictures: Path) -> None:
    images = [Image.open(path).resize((400, 300)) for path in sorted(pictures.glob("*.png"))[:3]]
    assert "`tiny` is a toy base of 64 pixels for tests" in plan(images)
    for task in ("subject", "style", "concept"):
        assert f"and use its recipe, sd15-{task}." in plan(
            images, task, **({"subject": "dog"} if task == "concept" else {})
        )
    images = [image.resize((90, 70)) for image in images]
    assert "is a toy base" not in plan(images)


def test_backdrops_that_are_all_the_same(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    for place in range(4):
        for name, ground in (("same", np.full((64, 64, 3), 230)), ("other", chance.integers(0, 255, (8, 8, 3)))):
            values = np.kron(ground, np.ones((64 // len(ground),) * 2 + (1,))).astype(np.uint8)
            values[16:48, 16 + place : 40] = chance.integers(0, 255, 3)
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / name / f"{place}.png")
    assert "nearly the same backdrop" in plan(tmp_path / "same")
    assert "backdrop" not in plan(tmp_path / "other")


def test_sample_prompts_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {trigger} dog\n\n# a remark\na {trigger} dog at night\n", "utf-8")
    assert read_prompts([str(tmp_path / "prompts.txt")]) == ["a {trigger} dog", "a {trigger} dog at night"]
    assert read_prompts(["a dog", "b.txt"]) == ["a dog", "b.txt"]
    (tmp_path / "empty.txt").write_text("\n", "utf-8")
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    for name, answer in (
        ("none.txt", "there is no such file"),
        ("empty.txt", "has no prompts"),
        ("latin.txt", "is not UTF-8 text"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            read_prompts([str(tmp_path / name)])


def test_a_recipe_takes_its_prompts_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {trigger} dog\na {trigger} dog at night\n", "utf-8")
    given = {"subject": "dog", "images": "pictures", "sample_prompts": str(tmp_path / "prompts.txt")}
    assert recipe_with(SUBJECT, given).sample_prompts == ["a {trigger} dog", "a {trigger} dog at night"]


def test_a_recipe_for_xl_on_the_toy_base(pictures: Path) -> None:
    assert "resolution=1024 is 16 times this base's resolution of 64" in plan(pictures, "sdxl-style", base="tiny")


def test_train_says_what_plan_says_and_each_warning_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "subject",
        f"images={pictures}",
        "subject=dog",
        "steps=1",
        "prior.weight=0",
        "sample_prompts=a dog",
    ]
    words += ["warmup=5"]
    assert call(monkeypatch, "plan", *words) == 0
    planned = capsys.readouterr().out
    assert call(monkeypatch, "train", *words, f"output={tmp_path / 'run'}") == 0
    told = capsys.readouterr()
    for line in planned.splitlines():
        assert line in told.out or (line.startswith("time") and "\ntime " in told.out)
    assert "Trained 1 steps" in told.out
    pitfalls = [line.removeprefix("look at: ") for line in planned.splitlines() if line.startswith("look at: ")]
    assert pitfalls
    assert not any(pitfall in told.err for pitfall in pitfalls)
