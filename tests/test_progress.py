"""Events of everything that lasts, how they are shown, and what another thread may ask for."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import diffgraft as dg
from diffgraft import progress
from diffgraft.bases import Base
from diffgraft.progress import (
    Advance,
    Artifact,
    Bars,
    Control,
    Done,
    Event,
    JsonLines,
    Lines,
    Note,
    Phase,
    Step,
    StoppedError,
    phase,
    reporting,
    silent,
    track,
)
from diffgraft.trainers.hooks.checkpoint import checkpoints
from tests.conftest import SHORT
from tests.recipes import SUBJECT
from tests.trainers.forks import command_line, in_fork

QUICK: dict[str, Any] = {**SHORT, "steps": 8, "checkpoint_every": 0, "prior": {"weight": 0}, "previews": False}


class InThread:
    """A training in another thread, its events with their times, and how it ended."""

    def __init__(self, control: Control, act: Callable[[Event], None] = silent, **settings: Any) -> None:
        self.events: list[tuple[float, Event]] = []
        self.error: BaseException | None = None

        def reporter(event: Event) -> None:
            self.events.append((time.monotonic(), event))
            act(event)

        def work() -> None:
            try:
                with reporting(reporter, control):
                    dg.train(SUBJECT, **settings)
            except BaseException as error:
                self.error = error

        self.begun = time.monotonic()
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def join(self) -> None:
        self.thread.join(300)
        assert not self.thread.is_alive()

    def steps(self) -> list[int]:
        return [event.step for _, event in self.events if isinstance(event, Step)]


def test_a_run_in_a_thread_is_never_silent_for_long(base: Base, pictures: Path, tmp_path: Path) -> None:
    """From pictures to before-after.png; events nest as phases do."""
    settings = {**QUICK, "previews": True, "sample_every": 4, "prior": {"images": 6}, "cache": False}
    run = InThread(Control(), base=base, images=pictures, output=tmp_path / "run", **settings)
    run.join()
    assert run.error is None
    times = [run.begun, *(when for when, _ in run.events), time.monotonic()]
    assert max(later - earlier for earlier, later in pairwise(times)) < 5
    assert run.steps() == list(range(1, 9))
    open_phases: list[str] = []
    seen = set()
    for _, event in run.events:
        match event:
            case Phase(name):
                open_phases.append(name)
                seen.add(name)
            case Advance(name) | Done(name):
                assert open_phases[-1] == name
                if isinstance(event, Done):
                    open_phases.pop()
    assert open_phases == []
    assert {"encoding pictures", "training", "samples at step 4", "pictures with the adapter"} <= seen
    artifacts = [event for _, event in run.events if isinstance(event, Artifact)]
    assert {"checkpoint", "samples"} <= {event.kind for event in artifacts}
    assert all(event.path.exists() for event in artifacts)


def test_a_stop_leaves_a_checkpoint_within_a_step_and_resumes_to_the_same_bytes(
    base: Base, pictures: Path, tmp_path: Path
) -> None:
    whole = dg.train(SUBJECT, base=base, images=pictures, output=tmp_path / "whole", **QUICK)
    control, has_begun = Control(), threading.Event()

    def act(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            has_begun.set()
            while not control.is_stopping:  # so that the test knows within which step it was asked for
                time.sleep(0.001)

    run = InThread(control, act, base=base, images=pictures, output=tmp_path / "run", **QUICK)
    assert has_begun.wait(120)
    control.stop()
    run.join()
    assert isinstance(run.error, StoppedError)
    assert f"diffgraft train --resume {tmp_path / 'run'}" in str(run.error)
    assert run.steps() == [1, 2, 3]
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000003"]
    again = dg.train(base=base, resume=tmp_path / "run")
    assert again.adapter_file.read_bytes() == whole.adapter_file.read_bytes()


def test_a_stop_before_the_first_step_is_said(base: Base, pictures: Path, tmp_path: Path) -> None:
    control = Control()
    control.stop()
    with reporting(silent, control), pytest.raises(StoppedError, match="Nothing was trained"):
        dg.train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **QUICK)


def test_samples_and_checkpoints_come_on_request(base: Base, pictures: Path, tmp_path: Path) -> None:
    control = Control()

    def act(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            control.sample_now()
            control.save_now()

    settings = {**QUICK, "previews": True, "steps": 4, "sample_prompts": "a dog"}
    with reporting(act, control):
        dg.train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step-000002.png"]
    assert "step-000004" in [folder.name for folder in checkpoints(tmp_path / "run")]


@pytest.mark.parametrize("where", ["reporter", "tracker"])
def test_an_error_out_of_a_reporter_or_a_tracker_loses_nothing(
    where: str, base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "steps": 6}
    if where == "reporter":

        def act(event: Event) -> None:
            if isinstance(event, Step) and event.step == 4:
                raise RuntimeError("the page is gone")
    else:
        from accelerate.tracking import TensorBoardTracker

        settings["trackers"] = ["tensorboard"]
        act, real = silent, TensorBoardTracker.log

        def log(self: Any, values: Any, step: int | None = None, **more: Any) -> None:
            if step == 4:
                raise RuntimeError("the page is gone")
            real(self, values, step=step, **more)

        monkeypatch.setattr(TensorBoardTracker, "log", log)
    with reporting(act), pytest.raises(RuntimeError, match="the page is gone"):
        dg.train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000004"]
    monkeypatch.undo()
    assert dg.train(base=base, resume=tmp_path / "run").steps == 6


def test_without_previews_no_picture_is_drawn(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a picture is drawn")

    monkeypatch.setattr("diffgraft.trainers.hooks.samples.Session", never)
    run = dg.train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **{**QUICK, "sample_every": 2})
    assert not run.before_after.exists()
    assert (run.folder / "loss.png").exists()


def test_a_log_has_no_bars(pictures: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TQDM_DISABLE": "1", "DIFFGRAFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "diffgraft", *words_of(pictures, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for text in (done.stdout, done.stderr):
        assert "\r" not in text
        assert "%|" not in text


def test_a_log_of_json_has_nothing_else(pictures: Path, tmp_path: Path) -> None:
    left = in_fork(command_line, *words_of(pictures, tmp_path), "--progress=json", folder=tmp_path)
    assert left.status == 0, left.err
    events = [json.loads(line) for line in left.err.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]


def words_of(pictures: Path, folder: Path) -> list[str]:
    """A short training by the command line."""
    words = ["train", SUBJECT, "subject=dog", f"images={pictures}", f"output={folder / 'run'}", "steps=3"]
    return [*words, "prior.weight=0", "previews=false", "sample_every=0", "batch=1"]


def test_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One every ten seconds for each phase, and one for each file and note."""
    now, stream = 0.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with reporting(Lines(stream)), phase("training", 100) as tracker:
        for _ in range(100):
            now += 1
            tracker.advance(remaining=90.0, values={"loss": 0.25})
        progress.emit(Note("look", is_warning=True))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "training: 10/100, loss 0.25, 01:30 left"
    assert lines[-1] == "warning: look"


def test_json_lines_are_json() -> None:
    stream = io.StringIO()
    with reporting(JsonLines(stream)):
        list(track([1, 2], "counting"))
        progress.emit(Step(1, 2, {"loss": float("nan")}))
        progress.emit(Artifact("plot", Path("a.png")))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["phase", "advance", "advance", "done", "step", "artifact"]
    assert events[4]["values"] == {"loss": None}
    assert events[5]["path"] == "a.png"


def test_bars_are_one_for_each_phase_and_text_of_others_is_escaped() -> None:
    stream = io.StringIO()
    bars = Bars(stream)
    with reporting(bars), phase("outer", 2) as outer:
        for item in track(["a", "b"], "inner\x1b[31m"):
            assert len(bars._bars) == 2
            assert item in "ab"
        outer.advance()
    assert bars._bars == []
    assert "\x1b[31m" not in stream.getvalue()


def test_a_terminal_gets_bars_and_anything_else_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert isinstance(progress.default_reporter(), Bars)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert isinstance(progress.default_reporter(), Lines)
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress.default_reporter(), Lines)


def test_few_items_are_no_phase() -> None:
    events: list[Event] = []
    with reporting(events.append):
        assert list(track([1, 2], "few", min_items=3)) == [1, 2]
    assert events == []


def test_a_control_is_heeded_where_it_was_given_alone() -> None:
    control = Control()
    control.stop()
    with reporting(silent, control), pytest.raises(StoppedError):
        list(track([1, 2], "stopped"))
    with reporting(silent):
        assert list(track([1, 2], "free")) == [1, 2]
