"""Trackers are shown what is recorded, step by step, and the samples; tensorboard's own reader reads them back."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, register_tracker_class
from PIL import Image

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT
from tests.trainers.test_resumed import interrupted

SETTINGS: dict[str, Any] = {"subject": "dog", "steps": 5, "checkpoint_every": 2, "sample_every": 2, "batch": 2}
SETTINGS |= {"sample_prompts": "a dog", "prior": {"weight": 0}, "validation": {"share": 0.4, "every": 2, "pairs": 4}}


def test_tensorboard_has_every_step_once_though_the_run_was_killed(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen step 3 when the run goes on from the checkpoint of step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(SUBJECT, base=base, images=pictures, output=folder, trackers="tensorboard", **SETTINGS)
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    run = train(base=base, resume=folder)
    seen = EventAccumulator(str(folder / "logs" / "diffgraft"), {"scalars": 0, "images": 0}).Reload()
    for name in ("loss", "lr", "validation"):
        wanted = [(entry["step"], entry[name]) for entry in run.metrics if name in entry]
        found = [(event.step, event.value) for event in seen.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    assert [event.step for event in seen.Images("samples")] == [2, 4]
    with Image.open(folder / "samples" / "step-000004.png") as image:
        shown = seen.Images("samples")[1]
        assert (shown.width, shown.height) == image.size
    (hparams,) = folder.glob("logs/diffgraft/*/hparams.yml")
    assert "validation.share: 0.4" in hparams.read_text("utf-8")
    assert "trackers" not in run.adapter.metadata["recipe"]


def test_a_tracker_of_ones_own_is_shown_all(
    base: Base, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    told: list[Any] = []

    class Mine(GeneralTracker):  # type: ignore[misc]
        name = "mine"
        requires_logging_directory = False

        def __init__(self, project: str) -> None:
            super().__init__()
            told.append(project)

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, values))

        def log_images(self, values: dict[str, Any], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("end")

    register_tracker_class(Mine)
    request.addfinalizer(lambda: LOGGER_TYPE_TO_CLASS.pop("mine"))
    settings = {**SETTINGS, "steps": 2}
    run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", trackers=["mine"], **settings)
    project, recipe, first, second, third, fourth, end = told
    assert (project, end) == ("diffgraft", "end")
    assert (recipe["lr"], recipe["validation.share"], recipe["sample_prompts"]) == (0.0015, 0.4, "['a dog']")
    values = [{name: value for name, value in entry.items() if name != "step"} for entry in run.metrics]
    validation = values[1].pop("validation")
    assert (first, second, third) == ((1, values[0]), (2, values[1]), (2, {"validation": validation}))
    step, pictured = fourth
    with Image.open(run.folder / "samples" / "step-000002.png") as image:
        assert step == 2
        assert np.array_equal(pictured["samples"][0], np.array(image))


def test_a_tracker_that_cannot_be_is_told_before_anything_is_written(
    base: Base, pictures: Path, tmp_path: Path
) -> None:
    for given, answer in (
        ("tensorbord", "Unknown tracker 'tensorbord': did you mean 'tensorboard'"),
        ("tensorboard, mlflow", "The tracker mlflow needs the package mlflow: python -m pip install mlflow"),
    ):
        assert "mlflow" not in map(str, get_available_trackers())
        with pytest.raises(DiffgraftError, match=answer):
            train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", trackers=given, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_how_they_are_named_on_a_command_line() -> None:
    def read(said: Any) -> list[str]:
        return load_recipe("style", {"trackers": said}).trackers

    assert read("") == []
    assert read("tensorboard") == ["tensorboard"]
    assert read("tensorboard,wandb") == read("tensorboard | wandb") == read(["tensorboard", "wandb"])
    with pytest.raises(DiffgraftError, match="trackers"):
        read(3)
