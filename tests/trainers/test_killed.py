"""Runs are killed for real (SIGKILL), at random moments of all they do, and end as if nothing had been."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import checkpoints, save_checkpoint
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.fingerprint import run_fingerprint
from diffgraft.trainers.run.train import train
from tests.recipes import SUBJECT
from tests.trainers.kill_helpers import SERVER, Said, check_whole, run_and_kill, run_to_its_end, spread
from tests.trainers.state_helpers import restored_step, state_of
from tests.trainers.test_resumed import differing

SAVES = ("metrics", "checkpoint", "adapter")
METHODS = {
    "lora": ["method=lora", "trigger=sks"],
    "textual-inversion": ["method=textual-inversion", "trigger=<zorp>"],
    "hypernetwork": ["method=hypernetwork", "options.dropout=0,0.3,0"],
}
TRIES = 9
"""Chains of kills that are begun at most, until each moment was hit in one chain"""
IDENTITY = run_fingerprint(load_recipe("style", {}), "a base", "pictures")


def phases_of(said: list[Said], chain: int) -> list[str]:
    """What a run is killed in, in this order; the chain of each method has another kind of saving."""
    saving = SAVES[chain % len(SAVES)]
    drawn = ["class images"] if any(phase == "class images" for phase, _ in said) else []
    return [*drawn, "encoding", "step", saving, *([] if drawn else ["drawing"])]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(
    method: str, pictures: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    dice, hits = random.Random(seed), Counter[str]()
    print(f"seed {seed}")
    words = ["train", SUBJECT, f"images={pictures}", "subject=dog", "steps=4", "checkpoint_every=2", "sample_every=2"]
    words += ["adapter_every=2", "sample_prompts=a dog", "batch=2", *METHODS[method]]
    words += [] if method == "textual-inversion" else ["prior.images=3"]
    whole = tmp_path / "whole"
    said = run_to_its_end([*words, f"output={whole}"], tmp_path / "cache")
    assert check_whole(whole) > 8
    places = [tmp_path / "0"]
    for phase in phases_of(said, list(METHODS).index(method)):
        hit = ""
        while hit != phase:
            folder, cache = places[-1] / "run", places[-1] / "cache"
            number, delay = spread(dice, said, phase)
            started = (folder / "recipe.yaml").exists()
            command = ["train", "--resume", str(folder)] if started else [*words, f"output={folder}"]
            hit = run_and_kill(command, cache, phase, number, delay)
            hits[hit] += 1
            print(f"{places[-1].name}: {phase} {number + 1}, {delay:.4f} s: killed at {hit or 'nothing'}")
            check_whole(places[-1])
            if hit != phase:  # it came to something else meanwhile, and what was meant may not come again
                places.append(tmp_path / str(len(places)))
            assert len(places) < TRIES
    print(dict(hits))
    for place in (place for place in places if (place / "run").exists()):
        run_to_its_end(["train", "--resume", str(place / "run")], place / "cache")
        assert differing(whole, place / "run") == set()
        assert [path.name for path in (place / "run").rglob(".*")] == [".lock"]  # nothing that the killed ones left


def lines(folder: Path) -> int:
    """Steps that a run has recorded so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_command_line_is_killed_and_interrupted(base: Base, pictures: Path, tmp_path: Path) -> None:
    """Killed, taken up at once, refused to another process meanwhile, stopped by Ctrl-C, and taken up again.

    Each process has a hash seed of its own, and their result is that of a single one.
    """
    settings: dict[str, Any] = {"subject": "dog", "steps": 20, "checkpoint_every": 3, "batch": 2, "sample_every": 0}
    settings |= {"previews": False, "prior.weight": 0, "images": str(pictures)}
    folder, whole = tmp_path / "run", tmp_path / "whole"

    def started(seed: int, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "diffgraft", "train", *map(str, words)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "DIFFGRAFT_CACHE": str(tmp_path / "cache")}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for_line(number: int, process: subprocess.Popen[str]) -> None:
        while lines(folder) < number:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    with started(1, SUBJECT, *(f"{key}={value}" for key, value in settings.items()), f"output={folder}") as first:
        wait_for_line(5, first)
        first.kill()
    assert first.returncode == -signal.SIGKILL
    check_whole(tmp_path)
    with started(2, "--resume", folder) as second:
        wait_for_line(7, second)
        with pytest.raises(DiffgraftError, match="Another process is using"):
            train(base=base, resume=folder)
        second.send_signal(signal.SIGINT)
        _, said = second.communicate()
    assert second.returncode == 1
    assert f"Interrupted. Continue with: diffgraft train --resume {folder}" in said
    assert "Traceback" not in said
    check_whole(tmp_path)
    assert checkpoints(folder)[-1].name == f"step-{lines(folder):06d}"
    assert 7 <= lines(folder) < 20
    train(base=base, resume=folder)
    train(SUBJECT, base=base, output=whole, **settings)
    assert differing(whole, folder) == set()


def test_a_checkpoint_is_whole_wherever_its_writing_ends(tmp_path: Path) -> None:
    """Killed at each of its dealings with files in turn: there is always a newest one, and every one is whole."""
    before = tmp_path / "before"
    for step, is_due in ((1, True), (2, True), (3, False)):
        save_step(before, step, is_due=is_due)
    process = SERVER.Process(target=save_and_die_everywhere, args=(before, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    *killed, last = json.loads((tmp_path / "ended").read_text("utf-8"))
    assert {*killed} == {-signal.SIGKILL}
    assert last == 0
    found = set()
    for number in range(len(killed)):
        folder = tmp_path / str(number)
        check_whole(folder)
        parameter = nn.Parameter(torch.zeros(3, 2))
        step = restored_step(folder, IDENTITY, state_of(0, {"a": parameter}, torch.optim.AdamW([parameter])))
        assert step == parameter[0, 0] in (3, 4)
        found.add(tuple(path.name[-1] for path in checkpoints(folder)))
    assert len(killed) > 20
    assert found == {tuple(steps) for steps in ("23", "234", "24")}
    assert [path.name[-1] for path in checkpoints(tmp_path / str(len(killed)))] == ["2", "4"]


def save_step(folder: Path, step: int, *, is_due: bool) -> None:
    """A checkpoint whose one parameter is the step."""
    parameter = nn.Parameter(torch.full((3, 2), float(step)))
    state = state_of(step, {"a": parameter}, torch.optim.AdamW([parameter]))
    save_checkpoint(folder, IDENTITY, state, is_due=is_due)


def save_and_die_everywhere(before: Path, place: Path) -> None:
    """In a process of its own, whose forks save step 4 each: how they ended, up to the one that came to its end."""
    ended: list[int] = []
    save_step(place / "imports", 1, is_due=True)  # whatever they open is not counted
    while not ended or ended[-1] == -signal.SIGKILL:
        folder = place / str(len(ended))
        shutil.copytree(before, folder)
        if (child := os.fork()) == 0:
            try:
                save_and_die(folder, len(ended))
            finally:
                os._exit(1)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (place / "ended").write_text(json.dumps(ended), "utf-8")


def save_and_die(folder: Path, number: int) -> None:
    """Save step 4 over those there are, and die before the `number`th dealing with a file."""
    events = itertools.count()

    def count(event: str, _: object) -> None:
        is_file = event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree")
        if is_file and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_step(folder, 4, is_due=True)
    os._exit(0)
