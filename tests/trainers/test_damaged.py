"""A run whose folder was damaged, or touched, goes on from what is whole, and says what is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.hooks.metrics import read_metrics
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after

SETTINGS: dict[str, Any] = {"subject": "dog", "steps": 4, "checkpoint_every": 1, "batch": 1, "previews": False}
SETTINGS |= {"prior": {"weight": 0}, "sample_every": 0, "seed": 5, "rank": 2}


@pytest.fixture(scope="module")
def stopped(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after three of four steps, with checkpoints of the second and the third."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    with interrupted_after(3):
        train(SUBJECT, base=base, images=pictures, output=folder, **SETTINGS)
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-000003"]
    return folder


@pytest.fixture(scope="module")
def finished(base: Base, stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(stopped, tmp_path_factory.mktemp("finished") / "run"))
    train(resume=folder, base=base)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(bytes(content))


def another_step(folder: Path) -> None:
    text = (folder / "state.json").read_text("utf-8")
    (folder / "state.json").write_text(text.replace('"step": 3', '"step": 2'), "utf-8")


def foreign(folder: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, folder / "parameters.safetensors")


def without_sums_and_foreign(folder: Path) -> None:
    said = json.loads((folder / "state.json").read_text("utf-8"))
    del said["sha256"]
    (folder / "state.json").write_text(json.dumps(said), "utf-8")
    foreign(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "parameters.safetensors", -9),
        lambda folder: flip(folder / "optimizer.safetensors", -6),
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("[" * 100_000, "utf-8"),
        lambda folder: (folder / "state.json").write_text('{"step": 3}', "utf-8"),
        lambda folder: (folder / "state.json").write_text("null", "utf-8"),
        another_step,
        foreign,
        without_sums_and_foreign,
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    base: Base, run: Path, finished: Path, damage: Callable[[Path], Any]
) -> None:
    """A single flipped bit would otherwise give another adapter, and nothing would be said."""
    damage(run / "checkpoints" / "step-000003")
    with pytest.warns(UserWarning, match="step-000003 is damaged"):
        train(resume=run, base=base)
    wanted, found = (load_file(folder / "adapter.safetensors") for folder in (finished, run))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted | found)


@pytest.mark.parametrize("damage", [lambda file: flip(file, -9), Path.unlink])
def test_a_damaged_average_of_the_weights_is_noticed_as_well(
    base: Base, pictures: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    with interrupted_after(2):
        train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **SETTINGS, ema=0.5)
    newest = checkpoints(tmp_path / "run")[-1]
    damage(newest / "average.safetensors")
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        train(resume=tmp_path / "run", base=base)


def test_a_checkpoint_of_an_earlier_release_has_no_sums(base: Base, run: Path, finished: Path) -> None:
    for folder in checkpoints(run):
        said = json.loads((folder / "state.json").read_text("utf-8"))
        del said["sha256"]
        (folder / "state.json").write_text(json.dumps(said, sort_keys=True), "utf-8")
    train(resume=run, base=base)
    assert (run / "adapter.safetensors").read_bytes() == (finished / "adapter.safetensors").read_bytes()


def test_what_a_person_copied_beside_checkpoints_stays(base: Base, run: Path, finished: Path) -> None:
    kept = run / "checkpoints" / "step-000002-backup"
    shutil.copytree(run / "checkpoints" / "step-000002", kept)
    (run / "checkpoints" / "step-000009").write_text("a file")
    (run / "checkpoints" / "step-").mkdir()
    train(resume=run, base=base)
    assert (run / "adapter.safetensors").read_bytes() == (finished / "adapter.safetensors").read_bytes()
    assert (kept / "state.json").exists()


@pytest.mark.parametrize("line", ['{"step": 3, "lo', '{"step": "3"}', "[]", "{}", "\udcff", '{"step": 2, "loss": "x"}'])
def test_damaged_lines_of_metrics_are_left_out(run: Path, line: str) -> None:
    path = run / "metrics.jsonl"
    first, *others = path.read_text("utf-8").splitlines()
    content = "\n".join([first, line, *others, '{"step": 3, "loss": 0.'])
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"1 of the \d+ lines of .*metrics.jsonl are damaged"):
        entries = read_metrics(run)
    assert [json.dumps(entry) for entry in entries] == [first, *others]


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "odd"])
def test_a_damaged_or_foreign_adapter_in_the_folder(base: Base, finished: Path, tmp_path: Path, damage: str) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "adapter.safetensors"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        header = {"diffgraft": json.dumps({"recipe": {"steps": "4"}})} if damage == "odd" else None
        save_file({"x": torch.zeros(2, 3)}, path, header)
    with pytest.raises(DiffgraftError, match=r"adapter.safetensors (is damaged|was not written by this run)") as caught:
        train(resume=run, base=base)
    assert "\n" not in str(caught.value)
    path.unlink()
    train(resume=run, base=base)
    assert path.read_bytes() == whole


def test_a_file_in_the_place_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(DiffgraftError, match="is a file, but --resume needs the folder of a run"):
        train(resume=tmp_path / "run")
