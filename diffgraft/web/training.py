"""Requests to train: checked, turned into words of the command line, planned, and queued."""

import re
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import recipe_names
from diffgraft.web.files_of_runs import FOLDER
from diffgraft.web.jobs import Job, Queue, program_environment
from diffgraft.web.library import find_run, is_running
from diffgraft.web.limits import RateLimit, TooManyJobsError
from diffgraft.web.paths import check_value, safe_name
from diffgraft.web.settings import Settings

Value = str | int | float | bool | list[str] | None
_KEY = re.compile(r"[A-Za-z][\w.*+\-\[\]|?^$\\()]{0,200}")
"""Names of settings; those under `lr_scale` may be patterns"""
_OWN = ("output", "resume")
"""Settings that the studio makes itself"""
_MAX_SETTINGS, _MAX_VALUE = 300, 20_000


@dataclass(frozen=True)
class Planned:
    """What `diffgraft plan` says of a training."""

    lines: tuple[str, ...]
    refusal: str
    """Why the training would be refused; empty if it would not be"""


class Trainings:
    """The trainings of a studio."""

    def __init__(self, settings: Settings, queue: Queue) -> None:
        self._settings, self._queue = settings, queue
        self._rate = RateLimit(settings.limits.jobs_per_minute)
        self._planning, self._naming = threading.BoundedSemaphore(1), threading.Lock()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders whose files trainings may use."""
        return self._settings.root, *self._settings.folders

    def words(self, recipe: str, settings: Mapping[str, Value]) -> tuple[str, ...]:
        """Return recipe and settings as words of the command line.

        Raises:
            DiffgraftError: unknown recipe, invalid name of a setting, or a path outside of the studio's folders.
        """
        if recipe not in recipe_names():
            raise DiffgraftError(
                f"Unknown recipe {recipe[:100]!r}: choose one of those that `diffgraft recipes` lists."
            )
        return recipe, *self._setting_words(settings)

    def plan(self, recipe: str, settings: Mapping[str, Value]) -> Planned:
        """Return what `diffgraft plan` says, which takes some seconds.

        Raises:
            DiffgraftError: as in `words`.
            TooManyJobsError: another plan is being made.
        """
        words = self.words(recipe, settings)
        if not self._planning.acquire(timeout=30):
            raise TooManyJobsError("Another plan is being made. Try again in a moment.")
        try:
            done = subprocess.run(
                [*self._settings.command, "plan", *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd=self._settings.root,
                env=program_environment(),
                timeout=self._settings.limits.plan_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Planned((), f"The plan took longer than {self._settings.limits.plan_seconds:g} seconds.")
        finally:
            self._planning.release()
        problems = done.stderr.strip().splitlines()
        errors = [line.removeprefix("error: ") for line in problems if line.startswith("error: ")]
        warnings = [line for line in problems if line.startswith("warning: ")]
        failed = done.returncode != 0
        return Planned(
            (*done.stdout.splitlines(), *warnings),
            (errors or problems or [f"The plan ended with status {done.returncode}."])[-1] if failed else "",
        )

    def start(self, recipe: str, settings: Mapping[str, Value], name: str = "") -> Job:
        """Queue a new training in a folder of its own, called `name` or after the recipe and the time.

        Raises:
            DiffgraftError: as in `words`.
            TooManyJobsError: too many jobs wait, or were requested in the last minute.
        """
        words = self.words(recipe, settings)
        self._count_job()
        usual = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        with self._naming:
            run = self._new_folder(safe_name(name, usual) if name else usual)
            output = f"output={self._settings.root / run}"
            return self._queue.add(run, ("train", *words, output, "--progress", "json"))

    def resume(self, run: str, settings: Mapping[str, Value], *, allow_changes: bool = False) -> Job:
        """Queue the continuation of a run; `settings`, such as more steps, override its recipe.

        Args:
            run: name of the run.
            settings: settings that override the run's recipe.
            allow_changes: whether to go on although settings differ that affect the steps taken.

        Raises:
            DiffgraftError: as in `words`; or there is no such run, or it runs or waits already.
            TooManyJobsError: as in `start`.
        """
        folder = find_run(self._settings.root, run)
        words = self._setting_words(settings)
        if is_running(folder) or any(job.run == run for job in self._queue.jobs()):
            raise DiffgraftError(f"{run} runs or waits already.")
        self._count_job()
        allowed = ("--allow-changes",) if allow_changes else ()
        return self._queue.add(run, ("train", *words, "--resume", str(folder), *allowed, "--progress", "json"))

    def cancel(self, job_id: str) -> bool:
        """Remove a waiting job, and the folder of a run that never began; False if it does not wait."""
        job = next((job for job in self._queue.jobs() if job.id == job_id), None)
        if job is None or not self._queue.remove(job_id):
            return False
        for folder in (self._settings.root / job.run / FOLDER, self._settings.root / job.run):
            with suppress(OSError):  # it holds a run
                folder.rmdir()
        return True

    def _setting_words(self, settings: Mapping[str, Value]) -> list[str]:
        if len(settings) > _MAX_SETTINGS:
            raise DiffgraftError(f"There are {len(settings)} settings; at most {_MAX_SETTINGS} are taken.")
        words = []
        for key, value in settings.items():
            if not _KEY.fullmatch(key) or key in _OWN:
                raise DiffgraftError(f"Invalid setting {key[:100]!r}: must be a key of the recipe, other than output.")
            text = _as_text(value)
            if len(text) > _MAX_VALUE or "\0" in text:
                raise DiffgraftError(f"Invalid value of {key}: must be shorter than {_MAX_VALUE} characters.")
            check_value(self.folders, text)
            words.append(f"{key}={text}")
        return words

    def _new_folder(self, name: str) -> str:
        """Create the folder of a run, so that no other request gets its name, and return its name."""
        number, candidate = 1, name
        while True:
            try:
                (self._settings.root / candidate).mkdir(parents=True)
                (self._settings.root / candidate / FOLDER).mkdir()
            except FileExistsError:
                number += 1
                candidate = f"{name}-{number}"
            else:
                return candidate

    def _count_job(self) -> None:
        if len(self._queue.jobs()) >= self._settings.limits.queue:
            raise TooManyJobsError(f"{self._settings.limits.queue} jobs wait already: wait for one, or remove one.")
        if not self._rate.take():
            raise TooManyJobsError(f"More than {self._settings.limits.jobs_per_minute} jobs in a minute: wait a while.")


def _as_text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " | ".join(value)
    return "" if value is None else str(value)
