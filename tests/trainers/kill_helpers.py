"""Runs in processes of their own, which say what they are at, so that they can be killed in the middle of it."""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["tests.trainers.preloaded_base"])
"""One process that has imported everything and loaded the base; each run is a fork of it"""
TITLES = {"drawing class images": "class images", "encoding": "encoding", "pictures": "drawing", "samples": "drawing"}
"""What a bar's title begins with → what the run is at"""
DEAL_WITH_FILES = ("diffgraft.files", "diffgraft.trainers.hooks", "diffgraft.adapters.adapter")
"""Modules that are slowed down where a run saves; what else is called there computes names and tensors"""
Said = tuple[str, float]
"""What the run is at, and since when"""


def lasted(said: Sequence[Said], phase: str, number: int) -> float:
    """Seconds that the run was at this for the `number`th time."""
    pairs = [(start, end) for (name, start), (_, end) in pairwise(said) if name == phase]
    start, end = pairs[min(number, len(pairs) - 1)]
    return end - start


def run_to_its_end(words: Sequence[str], cache: Path) -> list[Said]:
    """Call the command line in a process of its own, and return what it was at."""
    process, pipe = _started(words, cache)
    said = list(_heard(pipe))
    process.join()
    assert process.exitcode == 0, (words, process.exitcode, said)
    return said


def run_and_kill(words: Sequence[str], cache: Path, phase: str, number: int, delay: float) -> str:
    """The same, killed so many seconds after it has come to `phase` for the `number`th time, counted from 0.

    Returns what it was at when it died; nothing where it had come to its end.
    """
    process, pipe = _started(words, cache)
    last, times = "", 0
    for last, _ in _heard(pipe):
        times += last == phase
        if times > number:
            time.sleep(delay)
            process.kill()
            break
    last = [last, *(phase for phase, _ in _heard(pipe))][-1]  # what it had still said before it died
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (words, process.exitcode)
    return last if process.exitcode else ""


def _started(words: Sequence[str], cache: Path) -> tuple[Any, Connection]:
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_call, args=(list(words), cache, theirs))
    process.start()
    theirs.close()
    return process, ours


def _heard(ours: Connection) -> Iterator[Said]:
    try:
        while True:
            yield ours.recv()
    except EOFError:
        return


def check_whole(folder: Path) -> int:
    """Open every file that has a final name, and return how many there are; those of hidden names may be anything."""
    count = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        count += 1
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".jsonl":
            text = path.read_text("utf-8")
            assert not text or text.endswith("\n"), path
            steps = [json.loads(line)["step"] for line in text.splitlines()]
            assert steps == sorted(steps)
            assert {*steps} == {*range(1, len({*steps}) + 1)}, path
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            assert path.read_text("utf-8").endswith("\n"), path
    for checkpoint in folder.rglob("step-*"):
        if checkpoint.is_dir() and not any(part.startswith(".") for part in checkpoint.relative_to(folder).parts):
            names = {path.name for path in checkpoint.iterdir()}
            assert names == {"parameters.safetensors", "optimizer.safetensors", "state.json"}, (checkpoint, names)
    return count


def _call(words: list[str], cache: Path, pipe: Connection) -> None:
    """In the child: the command line, with hooks that say what it is at."""
    from diffgraft.adapters.adapter import Adapter
    from diffgraft.cli.main import main
    from diffgraft.progress import Done, Event, Phase, reporting
    from diffgraft.trainers import loop
    from diffgraft.trainers.hooks import checkpoint
    from diffgraft.trainers.hooks.metrics import Metrics
    from diffgraft.trainers.run import train as run
    from tests.drawing import draw_in
    from tests.trainers.preloaded_base import BASE

    def at(phase: str) -> None:
        pipe.send((phase, time.monotonic()))

    def saying(phase: str, function: Callable[..., Any], *, slow: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def said(*words: Any, **named: Any) -> Any:
            at(phase)
            try:
                with _slow_motion() if slow else nullcontext():
                    return function(*words, **named)
            finally:
                at("other")

        return said

    open_phases: list[bool] = []

    def reporter(event: Event) -> None:
        match event:
            case Phase(name):
                phase = next((own for start, own in TITLES.items() if name.startswith(start)), "")
                open_phases.append(bool(phase))
                if phase:
                    at(phase)
            case Done() if open_phases and open_phases.pop():
                at("other")

    os.environ["DIFFGRAFT_CACHE"] = str(cache)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    run.load_base = lambda *_, **__: BASE
    draw_in(3)
    loop.TrainingLoop._accumulate = saying("step", loop.TrainingLoop._accumulate)  # type: ignore[method-assign]
    Metrics.add = saying("metrics", Metrics.add, slow=True)  # type: ignore[method-assign]
    checkpoint.save_checkpoint = saying("checkpoint", checkpoint.save_checkpoint, slow=True)
    Adapter.save = saying("adapter", Adapter.save, slow=True)  # type: ignore[method-assign]
    sys.argv = ["diffgraft", *words]
    with reporting(reporter):
        main()


@contextmanager
def _slow_motion() -> Iterator[None]:
    """A moment between any two lines that deal with files, so that a kill may fall between any two of them."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_name
        if not frame.f_globals.get("__name__", "").startswith(DEAL_WITH_FILES) or name.startswith("<"):
            return None
        if name == "unshared_contiguous":
            return None  # loops over tensors touch no file
        if event == "line":
            time.sleep(0.0001)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def spread(dice: random.Random, said: Sequence[Said], phase: str) -> tuple[int, float]:
    """A moment of this phase, where a whole run said this: for which time it comes to it, and seconds from there."""
    times = sum(name == phase for name, _ in said)
    number = dice.randrange(min(2, times) if phase == "step" else times)  # so that enough is left to be killed in
    return number, dice.uniform(0, 0.9 * lasted(said, phase, number))
