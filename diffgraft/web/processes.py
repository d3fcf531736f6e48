"""Processes that train: found again by their id and the time they began, and asked to stop."""

import json
import os
import signal
from pathlib import Path

import psutil

from diffgraft.web.files_of_runs import process_file

_TOLERANCE = 3.0
"""Seconds by which the start of a process may seem to move, as the clock is set"""


def running_process(run: Path) -> int | None:
    """Return the id of the process that trains in the folder `run`; None if there is none.

    The id alone would not do: after the process has ended, another may get it.
    """
    try:
        noted = json.loads(process_file(run).read_text("utf-8"))
        process = psutil.Process(noted["pid"])
        if abs(process.create_time() - noted["created"]) > _TOLERANCE or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, psutil.Error):
        return None
    return int(process.pid)


def request_stop(run: Path) -> bool:
    """Ask the process that trains in `run` to write a checkpoint and end, as Ctrl-C does; False without a process."""
    pid = running_process(run)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return False
    return True
