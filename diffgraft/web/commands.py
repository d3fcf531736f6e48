"""Commands of diffgraft that a request waits for, one at a time: plans, and new adapter files made of others."""

import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from diffgraft.web.jobs import program_environment
from diffgraft.web.limits import TooManyJobsError
from diffgraft.web.settings import Settings

_PATIENCE = 30.0
"""Seconds that a request waits for the one before it"""


@dataclass(frozen=True)
class Report:
    """Output of a command, or why it did nothing."""

    lines: tuple[str, ...]
    refusal: str
    """Why it did nothing; empty if it did what was asked for"""


class Commands:
    """Runs commands of the command line in processes of their own, for requests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = threading.BoundedSemaphore(1)

    def run(self, words: Sequence[str]) -> Report:
        """Run ``diffgraft WORDS…`` in the library folder and return what it said.

        Raises:
            TooManyJobsError: another command is being run.
        """
        if not self._turn.acquire(timeout=_PATIENCE):
            raise TooManyJobsError("Another request is being worked on. Try again in a moment.")
        try:
            done = subprocess.run(
                [*self._settings.command, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd=self._settings.root,
                env=program_environment(),
                timeout=self._settings.limits.command_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Report((), f"It took longer than {self._settings.limits.command_seconds:g} seconds.")
        finally:
            self._turn.release()
        problems = done.stderr.strip().splitlines()
        errors = [line.removeprefix("error: ") for line in problems if line.startswith("error: ")]
        warnings = [line for line in problems if line.startswith("warning: ")]
        refusal = (errors or problems or [f"It ended with status {done.returncode}."])[-1] if done.returncode else ""
        return Report((*done.stdout.splitlines(), *warnings), refusal)
