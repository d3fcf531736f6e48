"""A run that is stopped and goes on leaves, to the byte, what one that was never stopped leaves."""

import hashlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffgraft.bases import Base
from diffgraft.data import class_images as drawing
from diffgraft.data.class_images import class_images
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers import loop
from diffgraft.trainers.run.train import train
from diffgraft.trainers.runtime.interrupts import defer_sigint
from tests.recipes import SUBJECT

WAYS: dict[str, dict[str, Any]] = {
    "average": {"ema": 0.9, "text_encoder": True},
    "schedule-free": {"optimizer": "schedule-free"},
    "text that stops": {"optimizer": "schedule-free", "text_encoder": True, "text_encoder_stop": 2},
    "8 bits": {"optimizer": "adamw8bit", "rank": 64},
    "prodigy": {"optimizer": "prodigy", "lr": 1.0},
    "adafactor": {"optimizer": "adafactor", "method": "lokr"},
    "pivotal": {"method": "pivotal", "trigger": "<zorp>", "options": {"token_lr_scale": 4}},
    "custom": {"method": "custom", "trigger": "<zorp>", "lr": 5e-3},
    "tlora": {"method": "tlora", "gradient_checkpointing": True},
    "dropout": {"method": "hypernetwork", "options": {"dropout": [0, 0.3, 0]}, "gradient_checkpointing": True},
    "many": {"accumulate": 2, "flip": True, "lr_schedule": "cosine", "warmup": 2, "noise": {"pyramid": 0.3}},
}
UNDRAWN = ("8 bits", "prodigy", "adafactor", "many")
"""Those whose pictures are drawn as without them"""


def differing(one: Path, other: Path) -> set[str]:
    """Paths inside two folders at which they do not hold the same bytes; hidden files are left out."""
    found = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        for folder in (one, other)
    ]
    assert found[0]
    return {name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name)}


def interrupted(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the gradients of this step, counted from 0, are computed."""
    real = loop.TrainingLoop._accumulate

    def stop(*words: Any) -> Any:
        terms = real(*words)
        if words[-1] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    monkeypatch.setattr(loop.TrainingLoop, "_accumulate", stop)


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_is_never_stopped(
    way: str, base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"subject": "dog", "steps": 5, "checkpoint_every": 2, "sample_every": 2, "batch": 2}
    settings |= {"sample_prompts": "a dog", "prior": {"weight": 0}, "previews": way not in UNDRAWN, **WAYS[way]}
    train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        interrupted(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").exists()
    train(base=base, resume=tmp_path / "run")
    assert differing(tmp_path / "whole", tmp_path / "run") == set()


def test_samples_that_a_stop_left_out_are_drawn(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped while the samples of step 2 are drawn with the average, and goes on with what trains."""
    settings: dict[str, Any] = {"subject": "dog", "steps": 4, "checkpoint_every": 2, "sample_every": 2, "batch": 2}
    settings |= {"sample_prompts": "a dog", "prior": {"weight": 0}, "ema": 0.5}
    train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **settings)
    for every in (2, 0):  # the checkpoint lies there already, or comes of the interruption
        folder = tmp_path / str(every)
        with monkeypatch.context() as patch:
            patch.setattr(Session, "draw_each", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                train(SUBJECT, base=base, images=pictures, output=folder, **{**settings, "checkpoint_every": every})
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
        assert not (folder / "samples").exists()
        train(base=base, resume=folder)
        assert differing(tmp_path / "whole" / "samples", folder / "samples") == set()
        wanted, found = (load_file(run / "adapter.safetensors") for run in (tmp_path / "whole", folder))
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert differing(tmp_path / "whole", tmp_path / "2") == set()


def test_class_images_are_the_same_however_they_came_to_be(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn at once, interrupted, some of them lost, or among more of them: to the bit."""
    settings, prompts = DrawSettings(size=(64, 64), steps=2), ["a dog", "a cat", "a tree"]

    def drawn(cache: str, each: int = 3) -> dict[tuple[str, int], np.ndarray]:
        monkeypatch.setenv("DIFFGRAFT_CACHE", str(tmp_path / cache))
        found = class_images(base, prompts, each, settings, 7)
        return {(text, place % each): np.asarray(picture.image) for place, (text, picture) in enumerate(found)}

    def same(some: dict[tuple[str, int], np.ndarray]) -> bool:
        return all(np.array_equal(some[key], wanted[key]) for key in wanted)

    wanted = drawn("whole")
    real, kept = drawing.atomic_write, []

    def stop_after_six(path: Path) -> Any:
        kept.append(path)
        if len(kept) > 6:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "atomic_write", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            drawn("cut")
    assert len(list((tmp_path / "cut").rglob("*.png"))) == 6
    assert same(drawn("cut"))
    for path in sorted((tmp_path / "cut").rglob("*.png"))[1::4]:
        path.unlink()
    assert same(drawn("cut"))
    assert same(drawn("more", 5))
    for path, content in zip(sorted((tmp_path / "cut").rglob("*.png")), (b"", b"no picture"), strict=False):
        path.write_bytes(content)
    path.write_bytes(path.read_bytes()[:-200])
    assert same(drawn("cut"))  # what is damaged is drawn anew


def test_an_interruption_waits_for_the_end_of_the_block() -> None:
    done = []

    def update() -> None:
        with defer_sigint():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("update")
        done.append("never")

    def draw() -> None:
        with defer_sigint() as opened:
            try:
                with opened():
                    os.kill(os.getpid(), signal.SIGINT)
                    done.append("never")
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                done.append("put back")

    for work in (update, draw, lambda: os.kill(os.getpid(), signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt):
            work()
    with defer_sigint(), defer_sigint() as opened, opened():
        done.append("nothing came")
    assert done == ["update", "put back", "nothing came"]


def test_outside_of_the_main_thread_nothing_is_held_back() -> None:
    done = []

    def work() -> None:
        with defer_sigint() as opened, opened():
            done.append("work")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["work"]
