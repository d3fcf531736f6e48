"""A run that goes on otherwise than it began: what differs is told, and done where that is meant."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers import loop
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.fingerprint import differences, run_fingerprint
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after
from tests.trainers.test_resumed import differing

SETTINGS: dict[str, Any] = {"subject": "dog", "steps": 4, "checkpoint_every": 0, "batch": 2, "sample_prompts": "a dog"}
NAMES = ("parameters", "optimizer")
SETTINGS |= {"prior": {"weight": 0}, "sample_every": 0, "seed": 5, "previews": False}


@pytest.fixture(scope="module")
def halves(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    stopped_after(2, base, folder, images=pictures)
    return folder


def stopped_after(step: int, base: Base, folder: Path, **settings: Any) -> None:
    with interrupted_after(step):
        train(SUBJECT, base=base, output=folder, **{**SETTINGS, **settings})


@pytest.fixture
def run(halves: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halves, tmp_path / "run"))


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics]


def test_what_differs_is_told_by_its_key() -> None:
    def identity(base: str = "a", data: str = "b", **settings: Any) -> Any:
        settings = {"subject": "dog", **{key.replace("__", "."): value for key, value in settings.items()}}
        return run_fingerprint(load_recipe(SUBJECT, settings), base, data)

    assert differences(identity(), identity()) == []
    other = identity(lr="2e-3", prior__weight=0.5, flip=True, resolution=32, options__dora=True)
    assert sorted(differences(identity(), other)) == [
        "flip: false → true",
        "lr: 0.0015 → 0.002",
        "options.dora: unset → true",
        "prior.weight: 2.0 → 0.5",
        "resolution: unset → 32",
    ]
    told = ["the base differs", "the pictures or their captions differ"]
    assert differences(identity(), identity("x", "y")) == told
    assert differences(identity(), identity("x", "")) == told[:1]
    moved = identity("x", "y", images="new/", init_from="there")
    assert differences(identity(images="old/"), moved) == [
        "the base differs",
        "the pictures or their captions differ (images: old/ → new/)",
    ]
    free = {
        "checkpoint_every": 7,
        "sample_every": 7,
        "sample_prompts": "x",
        "adapter_every": 7,
        "steps": 7,
        "images": "/x",
    }
    assert differences(identity(), identity(**free)) == []
    assert differences(identity(lr_schedule="linear"), identity(lr_schedule="linear", steps=7)) == ["steps: 400 → 7"]
    older = {**identity(), "recipe": {key: value for key, value in identity()["recipe"].items() if key != "ema"}}
    assert differences(older, identity()) == []
    assert differences(older, identity(ema=0.5)) == ["ema: 0.0 → 0.5"]


def test_a_changed_setting_is_refused_and_nothing_is_written(base: Base, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(DiffgraftError, match=r"first 2 steps of .*run: .*lr: 0.0015 → 0.01.*--allow-changes"):
        train(base=base, resume=run, lr="1e-2")
    for settings, answer in (
        (
            {"rank": 4},
            r"rank: 8 → 4.*cannot be resumed with this change.*112 of its parameters.*was \(8, 128\).*\(4, 128\)",
        ),
        ({"method": "loha"}, r"method: lora → loha.*cannot be resumed.*was missing"),
        ({"steps": 1}, "has finished step 2 already, beyond steps=1"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            train(base=base, resume=run, allow_changes=True, **settings)
    with pytest.raises(DiffgraftError, match="did you mean 'lr'"):
        train(base=base, resume=run, lrr=1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_change_that_is_meant_holds_from_there_on(base: Base, pictures: Path, run: Path, tmp_path: Path) -> None:
    """The steps before are those of the old settings, those after are of the new ones, and the recipe says it."""
    old = train(SUBJECT, base=base, images=pictures, output=tmp_path / "old", **SETTINGS)
    done = train(base=base, resume=run, allow_changes=True, lr=0.03, weight_decay=0.5, steps=5)
    assert [entry["lr"] for entry in done.metrics] == [0.0015, 0.0015, 0.03, 0.03, 0.03]
    assert losses(done)[:3] == losses(old)[:3]
    assert losses(done)[3] != losses(old)[3]
    assert (done.recipe.lr, done.recipe.steps) == (0.03, 5)
    assert "lr: 0.03" in (run / "recipe.yaml").read_text("utf-8")
    assert done.adapter.metadata["recipe"]["lr"] == 0.03
    changes = [{"after": 2, "what": ["lr: 0.0015 → 0.03", "weight_decay: 0.01 → 0.5"]}]
    assert done.adapter.metadata["changes"] == changes
    assert "changes" not in old.adapter.metadata
    again = train(base=base, resume=run, allow_changes=True, steps=6, lr=0.02)
    changes += [{"after": 5, "what": ["lr: 0.03 → 0.02"]}]
    assert again.adapter.metadata["changes"] == changes
    values, moments = (load_file(old.folder / "checkpoints" / "step-000004" / f"{name}.safetensors") for name in NAMES)
    assert values.keys() == load_file(checkpoints(run)[-1] / "parameters.safetensors").keys()
    assert moments.keys() == load_file(checkpoints(run)[-1] / "optimizer.safetensors").keys()


def test_a_change_that_was_accepted_is_not_asked_for_again(base: Base, run: Path) -> None:
    """It was stopped again before it wrote a checkpoint of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_accumulate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(base=base, resume=run, allow_changes=True, lr=0.03)
    assert [path.name for path in checkpoints(run)] == ["step-000002"]
    done = train(base=base, resume=run)
    assert [entry["lr"] for entry in done.metrics] == [0.0015, 0.0015, 0.03, 0.03]
    assert done.adapter.metadata["changes"] == [{"after": 2, "what": ["lr: 0.0015 → 0.03"]}]


def test_what_decides_nothing_about_the_steps_may_be_set(base: Base, run: Path, pictures: Path, tmp_path: Path) -> None:
    """And pictures and base may have moved, as long as they are the same."""
    moved = shutil.copytree(pictures, tmp_path / "moved")
    old = train(SUBJECT, base=base, images=pictures, output=tmp_path / "old", **SETTINGS)
    free = {"checkpoint_every": 1, "sample_every": 2, "sample_prompts": "a cat | a dog", "previews": True}
    done = train(base="tiny", resume=run, images=moved, **free)
    assert losses(done) == losses(old)
    assert [path.name for path in checkpoints(run)] == ["step-000003", "step-000004"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert str(moved) in (run / "recipe.yaml").read_text("utf-8")


def test_other_pictures_and_another_base_are_told(base: Base, run: Path, pictures: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    Image.new("RGB", (80, 60), "red").save(other / "01.png")
    saved = (run / "recipe.yaml").read_bytes()
    with pytest.raises(DiffgraftError, match=rf"\(images: {pictures} → {other}\)"):
        train(base=base, resume=run, images=other)
    assert (run / "recipe.yaml").read_bytes() == saved  # so that a plain --resume goes on with the old ones
    other_base = load_base("tiny")
    other_base.unet.conv_in.bias.data += 0.1
    other_base.__post_init__(None)
    with pytest.raises(DiffgraftError, match=r": the base differs"):
        train(base=other_base, resume=run)
    assert train(base=other_base, resume=run, images=other, allow_changes=True).metrics[-1]["step"] == 4


def test_a_finished_run_goes_on_where_it_is_to_have_more_steps(base: Base, pictures: Path, tmp_path: Path) -> None:
    """And ends as one that was to have as many from the start, stopped on the way or not."""
    folder, long = tmp_path / "run", tmp_path / "long"
    settings = {**SETTINGS, "images": pictures, "checkpoint_every": 2, "sample_prompts": "a sks dog", "lr": 0.02}
    settings["previews"] = True
    train(SUBJECT, base=base, output=long, **{**settings, "steps": 6})
    first = train(SUBJECT, base=base, output=folder, **settings)
    assert (first.steps, first.was_finished) == (4, False)
    old, pictured = first.adapter_file.read_bytes(), first.before_after.read_bytes()
    again = train(base=base, resume=folder)
    assert (again.steps, again.was_finished) == (4, True)
    with pytest.raises(DiffgraftError, match="finished at step 4"):
        train(base=base, resume=folder, lr=0.5, allow_changes=True)
    with pytest.raises(DiffgraftError, match=r"lr: 0.02 → 0.5"):
        train(base=base, resume=folder, lr=0.5)
    assert "lr: 0.02" in (folder / "recipe.yaml").read_text("utf-8")
    other = shutil.copytree(pictures, tmp_path / "other")
    with pytest.raises(
        DiffgraftError, match=rf"finished at step 4, trained on images={pictures}: .*other would not be"
    ):
        train(base=base, resume=folder, images=other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_accumulate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(base=base, resume=folder, steps="6")
    assert first.adapter_file.read_bytes() == old  # it stays until there is another
    done = train(base=base, resume=folder)
    assert (done.steps, done.was_finished) == (6, False)
    assert done.before_after.read_bytes() != pictured
    assert differing(long, folder) == set()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(DiffgraftError, match="finished at step 6 and has no checkpoint"):
        train(base=base, resume=folder, steps=8)
    done.before_after.unlink()
    train(base=base, resume=folder)
    assert differing(long, folder) == {str(path.relative_to(long)) for path in long.glob("checkpoints/*/*")}
