"""An adapter under the training: what is trained on top of it, what samples show, what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.methods.student import Student
from diffgraft.bases import Base, load_base
from diffgraft.bases.student import StudentSize, student_unet
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.run import train as run
from diffgraft.trainers.run import train_adapter
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.interrupt_helpers import interrupted_after
from tests.trainers.test_start import sha

FAST: dict[str, Any] = {**SHORT, "steps": 3, "batch": 2, "checkpoint_every": 0, "prior": {"weight": 0}}
PROMPT = "a <zorp> in the snow"
LAYER = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(autouse=True)
def _draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "before_after", lambda *_: Image.new("RGB", (8, 8)))


@pytest.fixture
def go(base: Base, pictures: Path, tmp_path: Path) -> Any:
    """Trains, each time in a new folder."""
    count = iter(range(99))

    def trained(**settings: Any) -> Run:
        return train(
            SUBJECT, base=base, images=pictures, **{"output": tmp_path / f"run-{next(count)}", **FAST, **settings}
        )

    return trained


@pytest.fixture(scope="module")
def bare(base: Base, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without an adapter under it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "before_after", lambda *_: Image.new("RGB", (8, 8)))
        return train(SUBJECT, base=base, images=pictures, output=tmp_path_factory.mktemp("bare") / "run", **FAST)


def predicted(base: Base, prompt: str = PROMPT) -> Tensor:
    """What the base predicts for noisy latents that are wider than high."""
    noisy = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return base.denoise(noisy, torch.tensor([600]), base.condition([prompt]))


def trained_values(run: Run) -> dict[str, Tensor]:
    """Values of a run's adapter by path and leaf."""
    return {
        f"{path}.{name}": value
        for path, deltas in run.adapter.deltas.items()
        for delta in deltas
        for name, value in getattr(delta, "leaves", {}).items()
    }


class Seen:
    """Stands in for the drawing of samples, and keeps what the base predicts meanwhile."""

    def __init__(self) -> None:
        self.predictions: list[Tensor] = []

    def __call__(self, prompts: Sequence[str], side: int, base: Base, *_: Any, **__: Any) -> dict[str, Any]:
        self.predictions.append(predicted(base))
        return {prompts[0]: [Image.new("RGB", (side, side))]}


@pytest.mark.parametrize("method", ["loha", "full", "pivotal", "hypernetwork"])
def test_a_run_trains_on_top_of_it_and_samples_are_drawn_without(
    method: str, go: Any, base: Base, bare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds: the run equals one on a base with the adapter merged; samples see the plain base, bit for bit."""
    plain = predicted(base)
    trigger = {"trigger": "<zorp>"} if method == "pivotal" else {}
    below = go(method=method, lr=1e-4 if method == "full" else 1e-2, **trigger)
    assert torch.equal(predicted(base), plain)

    seen = Seen()
    monkeypatch.setattr(train_adapter, "draw_samples", seen)
    frozen = {"lr": 1e-30, "previews": True, "sample_every": 1, "steps": 2}  # LoRA starts at zero, and stays there
    go(under={"adapter": str(below.adapter_file), "strength": 0.5}, **frozen)
    words = below.adapter.tokens  # they stay for the whole training, and are no part of the base
    if words:
        with graft(base, {Adapter({}, below.adapter.metadata, tokens=words): 1.0}):
            plain = predicted(base)
    assert [torch.equal(each, plain) for each in seen.predictions] == [True, True]

    over = go(under={"adapter": str(below.adapter_file), "strength": 0.5})
    with graft(base, {below.adapter: 0.5}):
        wanted = go(cache=False)
    values, same, other = (trained_values(each) for each in (over, wanted, bare))
    assert all(torch.equal(values[name], same[name]) for name in same)
    assert any(not torch.equal(values[name], other[name]) for name in other)
    assert over.adapter.metadata["under"] == sha(below.adapter_file)
    assert over.adapter.metadata["base"] == bare.adapter.metadata["base"]
    assert str(below.folder) not in str(over.adapter.metadata)


def test_samples_show_an_adapter_that_is_always_there(go: Any, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    below = go(lr=1e-2)
    seen = Seen()
    monkeypatch.setattr(train_adapter, "draw_samples", seen)
    monkeypatch.setattr(run, "before_after", lambda *_: seen([""], 8, base)[""][0])
    go(under={"adapter": str(below.folder), "when": "always"}, lr=1e-30, previews=True, sample_every=2, steps=2)
    with graft(base, {below.adapter: 1.0}):
        wanted = predicted(base)
    assert len(seen.predictions) == 2
    assert all(torch.equal(each, wanted) for each in seen.predictions)
    assert not torch.equal(predicted(base), wanted)


def test_a_run_goes_on_with_it_to_the_same_bytes(go: Any, tmp_path: Path) -> None:
    below = go(lr=1e-2)
    file = below.adapter.save(tmp_path / "below.safetensors", "diffgraft")
    settings = {"under": {"adapter": str(file)}, "steps": 4, "checkpoint_every": 2}
    whole = go(**settings)
    with interrupted_after(2):
        go(**settings, output=tmp_path / "stopped")
    again = train(resume=tmp_path / "stopped")
    assert sha(again.adapter_file) == sha(whole.adapter_file)


def test_another_file_is_told_when_resuming(go: Any, tmp_path: Path) -> None:
    file = go(lr=1e-2).adapter.save(tmp_path / "below.safetensors", "diffgraft")
    begun = go(under={"adapter": str(file)}, checkpoint_every=1)
    go(lr=2e-2).adapter.save(file, "diffgraft")
    with pytest.raises(DiffgraftError, match=r"the file of under\.adapter differs"):
        train(resume=begun.folder, steps=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"under": {"strength": 0.5}}, "set under.adapter"),
        ({"under": {"adapter": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"under": {"adapter": "{file}"}}, "of its 1 modules match"),
        ({"under": {"adapter": "{file}"}, "method": "full", "previews": True}, "previews=false"),
        ({"under": {"adapter": "{file}"}, "shard": "full"}, "shard"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str, go: Any, tmp_path: Path) -> None:
    """Sentences of `train` and of `plan`, before anything is written."""
    misfit = Adapter({LAYER: (low_rank(torch.ones(2, 5), torch.ones(7, 2)),)}, {})
    file = misfit.save(tmp_path / "misfit.safetensors", "diffgraft")
    under = {
        key: str(value).replace("{file}", str(file)) if key == "adapter" else value
        for key, value in settings["under"].items()
    }
    with pytest.raises(DiffgraftError, match=words):
        go(**{**settings, "under": under})
    assert not (tmp_path / "run-0").exists()


def test_a_plan_checks_it(tmp_path: Path, pictures: Path) -> None:
    misfit = Adapter({LAYER: (low_rank(torch.ones(2, 5), torch.ones(7, 2)),)}, {})
    file = misfit.save(tmp_path / "misfit.safetensors", "diffgraft")
    with pytest.raises(DiffgraftError, match="of its 1 modules match"):
        plan_run(SUBJECT, {**FAST, "images": pictures, "under": {"adapter": str(file)}})


def test_a_student_cannot_be_under_a_training(go: Any, base: Base, pictures: Path, tmp_path: Path) -> None:
    """The run and its plan refuse it; an adapter on the denoiser that it replaces would have no effect."""
    student = student_unet(base.denoiser, StudentSize(layers=1, middle=False))
    network = Student(student.state_dict(), dict(student.config))
    file = str(
        Adapter({}, {"method": "student"}, networks=(network,)).save(tmp_path / "student.safetensors", "diffgraft")
    )
    with pytest.raises(DiffgraftError, match="is a student, which computes in the place"):
        plan_run(SUBJECT, {**FAST, "images": pictures, "under": {"adapter": file}})
    with pytest.raises(DiffgraftError, match="is a student, which computes in the place"):
        go(under={"adapter": file})
    assert not (tmp_path / "run-0").exists()


def test_the_base_is_as_before_when_a_run_fails(go: Any, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    below, plain = go(lr=1e-2), predicted(base)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("while drawing")

    monkeypatch.setattr(train_adapter, "draw_samples", fail)
    with pytest.raises(RuntimeError, match="while drawing"):
        go(under={"adapter": str(below.adapter_file)}, previews=True, sample_every=1)
    assert torch.equal(predicted(base), plain)
    assert base.under == ""
    assert load_base("tiny").hash == base.hash
