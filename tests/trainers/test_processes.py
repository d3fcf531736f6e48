"""Two processes train as one with twice the batches: real ones, which talk over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, is_deepspeed_available
from safetensors.torch import load_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.hooks.metrics import read_metrics
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from diffgraft.trainers.runtime.processes import check_same_step, new_accelerator
from diffgraft.trainers.runtime.shards import check_compatible, check_frozen
from tests.recipes import SUBJECT
from tests.trainers.forks import command_line, in_two
from tests.trainers.kill_helpers import check_whole

HELD_OUT = {"share": 0.4, "every": 2, "pairs": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "prior": {"images": 5}, "validation": HELD_OUT},
    "tlora at both strengths": {
        "method": "tlora",
        "gradient_checkpointing": True,
        "prior": {"weight": 0},
        "loss": {"objective": "slider", "options": {"positive": "a dog at night", "both": True}},
    },
    "textual-inversion": {"method": "textual-inversion", "trigger": "<zorp>", "templates": "object"},
}
OVER_SHARDS: dict[str, Any] = {
    "method": "locon",
    "options": {"dora": True},
    "prior": {"by": "prediction"},
    "gradient_checkpointing": True,
    "validation": HELD_OUT,
}
SETTINGS |= {"over fsdp": {**OVER_SHARDS, "shard": "fsdp"}}
if is_deepspeed_available():
    SETTINGS |= {"over zero3": {**OVER_SHARDS, "shard": "zero3"}}
COMMON: dict[str, Any] = {"subject": "dog", "steps": 3, "checkpoint_every": 2, "sample_every": 2, "batch": 2}
COMMON |= {"sample_prompts": "a dog", "adapter_every": 2}
PLAIN = load_recipe(SUBJECT, {"subject": "dog"})


def local(value: Any) -> Any:
    """What this process holds of a weight."""
    return value.to_local() if hasattr(value, "to_local") else getattr(value, "ds_tensor", value)


def train_all(pictures: Path, folder: Path) -> None:
    """In each of two processes: a run with each of the settings, which leaves the base as it was."""
    from accelerate import PartialState

    from diffgraft.trainers.run import train_adapter as learn
    from tests.drawing import draw_in
    from tests.trainers.preloaded_base import BASE

    class TrainingLoop(learn.TrainingLoop):
        def run(self) -> None:
            super().run()
            unet = getattr(self.predict, "module", self.predict).denoiser
            shares.append(sum(local(value).numel() for value in unet.parameters()) / whole)

    shares: list[float] = []
    learn.TrainingLoop = TrainingLoop  # type: ignore[misc]
    draw_in(2)
    unet, before = BASE.unet, {name: value.clone() for name, value in BASE.unet.state_dict().items()}
    whole = sum(value.numel() for value in unet.parameters())
    for name, settings in SETTINGS.items():
        train(SUBJECT, base=BASE, images=pictures, output=folder / name, **COMMON, **settings)
        assert PartialState().num_processes == 2
        assert abs(shares.pop() - (0.5 if "over" in name else 1)) < 0.01
        assert BASE.unet is unet
        assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    (folder / f"rank-{PartialState().process_index}").touch()


@contextmanager
def launched(*words: str, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes of one command, started by torchrun, which are ended where they wait for one another for ever."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "DIFFGRAFT_CACHE": str(cache)}
    with subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            run.terminate()


@pytest.fixture(scope="module")
def both(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have trained both."""
    folder = tmp_path_factory.mktemp("together")
    for left in in_two(train_all, pictures, folder, folder=folder):
        assert left.status == 0, left.err
    assert sorted(path.name for path in folder.glob("rank-*")) == ["rank-0", "rank-1"]
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_one_with_twice_the_batches(
    name: str, both: Path, base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / "cache"))
    settings = {**COMMON, **SETTINGS[name], "accumulate": 2, "shard": "none"}
    alone = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    together = Run(both / name, alone.recipe, [])
    check_whole(both / name)
    files = {str(path.relative_to(alone.folder)) for path in alone.folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(together.folder)) for path in together.folder.rglob("*") if path.is_file()} == files
    wanted, found = load_file(alone.adapter_file), load_file(together.adapter_file)
    for key, value in wanted.items():
        # Adam makes the rounding of a tiny gradient as large as a step: single numbers may differ, the whole may not
        assert (found[key] - value).norm() < 1e-3 * value.norm(), key
    theirs, ours = (
        [entry["loss"] for entry in read_metrics(run.folder) if "loss" in entry] for run in (together, alone)
    )
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert len(list((both / "cache").rglob("class-images/*/*.png"))) == 5


def trained_in_two(folder: Path, **settings: Any) -> Adapter:
    """What a run of two processes leaves in `folder`, by the command line."""
    given = {"subject": "dog", "prior.weight": 0, "sample_every": 0, "previews": False, "seed": 3, **settings}
    words = ["train", SUBJECT, *(f"{key}={value}" for key, value in given.items()), f"output={folder}"]
    for left in in_two(command_line, *words, folder=folder.parent):
        assert left.status == 0, left.err[-3000:]
    state = json.loads((checkpoints(folder)[-1] / "state.json").read_text("utf-8"))
    assert state["identity"]["processes"] == 2
    return load_adapter(folder / "adapter.safetensors")


def test_text_encoders_of_two_processes_stop_together(base: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {"images": pictures, "steps": 5, "accumulate": 2, "text_encoder": True, "text_encoder_stop": 2}
    rates = {"lr_scale.M00": 0.5, "lr_scale.OUT03": 0}
    found = trained_in_two(tmp_path / "two", batch=1, checkpoint_every=1, **settings, **rates)
    before, after = (load_file(folder / "parameters.safetensors") for folder in checkpoints(tmp_path / "two"))
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("text_encoder."), name
    more = {"subject": "dog", "prior": {"weight": 0}, "sample_every": 0, "previews": False, "seed": 3}
    alone = train(SUBJECT, base=base, output=tmp_path / "one", batch=2, **more, **settings, **rates).adapter
    assert set(found.modules) == set(alone.modules)
    for path, (delta,) in found.deltas.items():
        for name, leaf in delta.leaves.items():
            wanted = alone.deltas[path][0].leaves[name]
            assert (leaf - wanted).norm() < 1e-2 * wanted.norm(), (path, name)


def test_what_does_not_reach_the_loss_is_no_trouble(folders: Path, pictures: Path, tmp_path: Path) -> None:
    """Of the first text encoder of XL the last layer gets no gradient, which would stop two processes."""
    settings = {"steps": 2, "batch": 1, "method": "full", "text_encoder": True, "lr": 1e-4, "resolution": 32}
    found = trained_in_two(tmp_path / "two", images=pictures, base=folders / "sdxl", **settings)
    assert any(path.startswith("text_encoder.encoder.layers.0.") for path in found.modules)
    assert not any(path.startswith(("text_encoder.encoder.layers.1.", "text_encoder.final")) for path in found.modules)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shard": "fsdp"}, r"several processes, but there is one: start them with .torchrun --nproc_per_node 2"),
        ({"shard": "fdsp"}, "fsdp"),
    ],
)
def test_what_cannot_be_in_shards_is_refused(
    settings: dict[str, Any], said: str, base: Base, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffgraftError, match=said):
        train(SUBJECT, base=base, images=pictures, subject="dog", output=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_shards_need_a_frozen_unet_and_its_weights_as_they_are(base: Base) -> None:
    for key, value in {"quantize": "nf4", "compile": True, "channels_last": True}.items():
        plan = load_recipe(SUBJECT, {"subject": "dog", "shard": "fsdp", key: value})
        with pytest.raises(DiffgraftError, match=f"{key}={str(value).lower()} cannot be combined with shard=fsdp"):
            check_compatible(plan.runtime, plan.quantize)
    plan = load_recipe(SUBJECT, {"subject": "dog", "shard": "fsdp", "method": "full"})
    live = attach(plan, base)
    try:
        with pytest.raises(DiffgraftError, match="this method trains the denoiser's own weights"):
            check_frozen(plan.shard, base, live)
    finally:
        live.detach()


def test_a_unet_that_is_trained_is_refused_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    words = ["train", SUBJECT, "subject=dog", f"images={pictures}", "method=full", "shard=fsdp"]
    for left in in_two(command_line, *words, f"output={tmp_path / 'run'}", folder=tmp_path):
        assert left.status == 1
        assert "needs a frozen denoiser, but this method trains" in left.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_accelerates_own_ways_to_cut_up_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Launched:
        distributed_type = DistributedType(kind)

        num_processes = 2

    monkeypatch.setattr("accelerate.Accelerator", lambda **_: Launched)
    with pytest.raises(DiffgraftError, match=f"launched with {kind}.*set shard="):
        new_accelerator(PLAIN.runtime, PLAIN.outputs)


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffgraftError, match=r"2 processes were started.*set ACCELERATE_USE_CPU=true"):
        new_accelerator(PLAIN.runtime, PLAIN.outputs)


def test_a_folder_that_a_machine_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Two:
        num_processes = 2

    for found in ([4, 4], [4, 0]):
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own, found=found: own + found[1:])
        if found[1]:
            check_same_step(Two, tmp_path, 4)
        else:
            with pytest.raises(DiffgraftError, match=r"different checkpoints in .*: 4, 0 steps\. Put the run's"):
                check_same_step(Two, tmp_path, 4)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_line(number: int, folder: Path, run: subprocess.Popen[str]) -> None:
    while lines(folder) < number:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def test_where_one_process_dies_or_all_are_interrupted_none_is_left(pictures: Path, tmp_path: Path) -> None:
    """And what they leave is whole, and goes on with as many processes as before."""
    folder, cache = tmp_path / "run", tmp_path / "cache"
    settings = {**COMMON, "steps": 500, "checkpoint_every": 4, "sample_every": 0, "prior.weight": 0}
    settings |= {"previews": False, "images": pictures}
    words = [SUBJECT, *(f"{key}={value}" for key, value in settings.items()), f"output={folder}"]
    with launched("-m", "diffgraft", "train", *words, cache=cache) as run:
        wait_for_line(5, folder, run)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text("utf-8").split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    check_whole(folder)
    done = checkpoints(folder)[-1]
    before = lines(folder)
    with launched("-m", "diffgraft", "train", "--resume", str(folder), cache=cache) as run:
        wait_for_line(before + 3, folder, run)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text("utf-8").split()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    check_whole(folder)
    assert checkpoints(folder)[-1].name > done.name
    with pytest.raises(DiffgraftError, match=r"Settings differ from those of .*processes: 2 → 1"):
        train(resume=folder)
