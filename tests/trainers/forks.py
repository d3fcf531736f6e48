"""Processes that need import nothing: forks of a server that has imported everything, alone or two of one run."""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trainers.kill_helpers import SERVER

_BOTH = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
"""What torchrun tells both processes of a run, and what has them run on CPUs"""
_SECONDS = 300


@dataclass(frozen=True)
class Left:
    """What a process has left."""

    status: int | None
    """Its exit status"""
    out: str
    """What it wrote to stdout"""
    err: str
    """What it wrote to stderr"""


def in_fork(work: Callable[..., None], *words: Any, folder: Path) -> Left:
    """Call `work(*words)` in a process of its own, with a cache of its own in `folder`."""
    (left,) = _run([{}], work, words, folder)
    return left


def in_two(work: Callable[..., None], *words: Any, folder: Path) -> list[Left]:
    """Call `work(*words)` in two processes that find each other as those of torchrun do.

    Where one fails, the other, which may wait for it for ever, is ended.
    """
    with socket.socket() as free:
        free.bind((_BOTH["MASTER_ADDR"], 0))
        port = str(free.getsockname()[1])
    own = [{**_BOTH, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return _run(own, work, words, folder)


def command_line(*words: str) -> None:
    """The command line with these words."""
    from diffgraft.cli.main import main

    sys.argv = ["diffgraft", *words]
    main()


def _run(
    environments: list[dict[str, str]], work: Callable[..., None], words: tuple[Any, ...], folder: Path
) -> list[Left]:
    processes, logs = [], []
    for number, own in enumerate(environments):
        logs.append([folder / f"{stream}-{number}" for stream in ("stdout", "stderr")])
        environment = {"DIFFGRAFT_CACHE": str(folder / "cache"), **own}
        processes.append(SERVER.Process(target=_call, args=(environment, logs[-1], work, words)))
        processes[-1].start()
    end = time.monotonic() + _SECONDS
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end or any(process.exitcode for process in processes):
            for process in processes:
                process.join(10)  # it may be failing as well, and say why
                process.kill()
        time.sleep(0.01)
    return [
        Left(process.exitcode, *(log.read_text("utf-8") for log in own))
        for process, own in zip(processes, logs, strict=True)
    ]


def _call(environment: Mapping[str, str], logs: list[Path], work: Callable[..., None], words: tuple[Any, ...]) -> None:
    """In the child: what it says goes into files."""
    os.environ.update(environment)
    for stream, log in zip((sys.stdout, sys.stderr), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), stream.fileno())
    work(*words)
