"""What cannot be trained is refused by `plan` and by `train` alike, before anything is drawn or written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.optim.optimizers import effective_lr, lr_warning, new_optimizer
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe, save_recipe
from diffgraft.trainers.run import train_adapter as learn
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.test_materials import folder


def refused(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, settings: dict[str, Any]) -> None:
    """Both refuse it, in the same words, and nothing is encoded, drawn or written."""
    monkeypatch.setattr(learn, "build_training_data", None)
    said = []
    for ask in (plan_run, lambda recipe, given: train(recipe, base=base, **given)):
        with pytest.raises(DiffgraftError, match=answer) as told:
            ask(SUBJECT, {"subject": "dog", "output": str(tmp_path / "run"), **settings})
        said.append(str(told.value))
    assert said[0] == said[1]
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (
            {"optimizer": "prodigy", "lr": 1, "text_encoder": True, "lr_scale": {"text_encoder": 0.5}},
            "one learning rate for all",
        ),
        ({"optimizer": "prodigy", "lr": 1, "options": {"loraplus_ratio": 4}}, "one learning rate for all"),
        (
            {"optimizer": "prodigy", "lr": 1, "text_encoder": True, "text_encoder_stop": 2},
            "would jump when the",
        ),
        ({"optimizer": "schedule-free", "lr_schedule": "cosine"}, "cannot use lr_schedule=cosine"),
        ({"optimizer": "schedule-free", "ema": 0.9}, "averages the weights itself"),
        ({"timesteps": {"min": 800, "max": 200}}, "min must not be above max"),
        ({"timesteps": {"max": 1000}}, "between 0 and 999"),
        ({"prior": {"folder": "/no/such"}}, "picture folder /no/such does not exist"),
        ({"lr_scale": {"OUT33": 2}}, "OUT33"),
        ({"resolution": 60}, "resolution=60: this base needs a multiple of 8"),
        ({"validation": {"share": 0.95}}, "leaves none to train on"),
        ({"validation": {"images": "/no/such"}}, "picture folder /no/such does not exist"),
    ],
)
def test_what_train_refuses_plan_refuses(
    base: Base,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    answer: str,
) -> None:
    if "validation" in settings:  # which is looked at as pictures are gathered, before anything is drawn
        for ask in (plan_run, lambda recipe, given: train(recipe, base=base, **given)):
            with pytest.raises(DiffgraftError, match=answer):
                ask(SUBJECT, {"subject": "dog", "output": str(tmp_path / "run"), "images": pictures, **settings})
        return
    refused(base, monkeypatch, tmp_path, answer, {"images": pictures, **settings})


def test_class_images_are_looked_at_before_the_run(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "reg"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"a\.jpg is left out"):
        refused(
            base,
            monkeypatch,
            tmp_path,
            "None of the 1 picture files",
            {"images": pictures, "prior": {"folder": broken}},
        )


def test_concepts_whose_classes_are_held_in_different_ways_are_refused(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [
        {"images": str(folder(tmp_path / name, 1, start=n)), "subject": name} for n, name in enumerate(("cat", "dog"))
    ]
    own[0]["prior"] = {"by": "prediction"}  # type: ignore[assignment]
    settings = {"concepts": own, "output": str(tmp_path / "run")}
    monkeypatch.setattr(learn, "build_training_data", None)
    for ask in (plan_run, lambda recipe, given: train(recipe, base=base, **given)):
        with pytest.raises(DiffgraftError, match="Concepts differ in prior preservation"):
            ask(SUBJECT, settings)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "schedule-free"])
def test_a_rate_of_prodigys_is_warned_of_elsewhere(optimizer: str, pictures: Path) -> None:
    recipe = load_recipe(SUBJECT, {"subject": "dog", "optimizer": optimizer, "lr": 1})
    assert "lr=1.0 is far too large for" in lr_warning(recipe)
    assert lr_warning(recipe.model_copy(update={"lr": 0.01})) == ""
    if optimizer == "adamw":
        assert "far too large for" in str(plan_run(SUBJECT, {"images": pictures, "subject": "dog", "lr": 1}))


def test_the_rate_that_prodigy_finds_is_recorded(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **SHORT,
        "prior": {"weight": 0},
        "sample_prompts": "a dog",
        "optimizer": "prodigy",
        "lr": 1,
    }
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    found = [entry["effective_lr"] for entry in run.metrics]
    assert len(found) == 6
    assert all(entry["lr"] == 1 for entry in run.metrics)
    assert found[0] == pytest.approx(1e-6)  # where it starts from
    assert found == sorted(found)


def test_the_rate_that_prodigy_finds_grows() -> None:
    value, goal = torch.nn.Parameter(torch.zeros(3)), torch.tensor([3.0, -2.0, 5.0])
    recipe = load_recipe(SUBJECT, {"subject": "dog", "optimizer": "prodigy", "lr": 1})
    optimizer = new_optimizer(recipe, {"value": value}, {})
    for _ in range(150):
        value.grad = 2 * (value.detach() - goal)
        optimizer.step()
    found = effective_lr(optimizer)
    assert found == optimizer.param_groups[0]["d"]
    assert found is not None
    assert found > 1e-4
    assert effective_lr(torch.optim.SGD([value], lr=0.5)) is None


def test_a_run_stays_out_of_a_persons_folders(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "prior": {"weight": 0}}
    data = folder(tmp_path / "data", 2)
    nested = folder(tmp_path / "kohya" / "3_sks dog", 1).parent
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.yaml").write_text("# diffgraft train recipe.yaml\n# made of config.toml\ntask: subject\n", "utf-8")
    file = tmp_path / "file"
    file.write_text("mine", "utf-8")
    parts = tmp_path / "parts"  # a run removes what its writing was interrupted at, which is called so
    parts.mkdir()
    (parts / ".partial-notes.txt").write_text("mine", "utf-8")
    cases = [
        (data, data, "is also a folder of training images"),
        (nested, nested / "3_sks dog", "is also a folder of training images"),
        (pictures, data, r"holds files that belong to no run \(00\.png and 1 more\)"),
        (pictures, own, r"holds files that belong to no run \(recipe\.yaml\)"),
        (pictures, file, "is a file"),
        (pictures, parts, r"holds files that belong to no run \(\.partial-notes\.txt\)"),
    ]
    for images, output, answer in cases:
        before = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
        for ask in (plan_run, lambda recipe, given: train(recipe, base=base, **given)):
            with pytest.raises(DiffgraftError, match=answer):
                ask(SUBJECT, {**settings, "images": images, "output": output})
        assert (sorted(path.name for path in output.iterdir()) if output.is_dir() else []) == before
    with pytest.raises(DiffgraftError, match="is also a folder of training images"):
        plan_run(SUBJECT, {**settings, "images": pictures, "output": data, "validation": {"images": data}})


def test_a_run_goes_where_nothing_is_or_where_one_was_refused(pictures: Path, tmp_path: Path) -> None:
    recipe = load_recipe(SUBJECT, {"subject": "dog", "images": str(pictures)})
    empty, left = tmp_path / "empty", tmp_path / "left"
    for place in (empty, left):
        place.mkdir()
    (left / ".lock").touch()
    (left / ".partial-recipe-xyz.yaml").touch()
    save_recipe(recipe, left / "recipe.yaml")
    for place in (empty, left, tmp_path / "new"):
        plan_run(SUBJECT, {"images": pictures, "subject": "dog", "prior": {"weight": 0}, "output": place})


@pytest.mark.parametrize("shard", ["fsdp", "zero3"])
def test_plan_refuses_shards_in_one_process_as_train_does(pictures: Path, shard: str) -> None:
    settings = {"images": str(pictures), "subject": "dog", "shard": shard}
    for start in (plan_run, train):
        with pytest.raises(DiffgraftError, match="but there is one: start them with `torchrun"):
            start(SUBJECT, **({"settings": settings} if start is plan_run else settings))
