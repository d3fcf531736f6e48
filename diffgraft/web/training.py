"""Requests to train: checked, turned into words of the command line, planned, and queued."""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.files import recipe_names
from diffgraft.web.commands import Commands, Report
from diffgraft.web.files_of_runs import FOLDER
from diffgraft.web.jobs import Job, Queue
from diffgraft.web.library import find_run, is_running
from diffgraft.web.limits import RateLimit, TooManyJobsError
from diffgraft.web.paths import check_value, safe_name
from diffgraft.web.settings import Settings

Value = str | int | float | bool | list[str] | None
_KEY = re.compile(r"[A-Za-z][\w.*+\-\[\]|?^$\\()]{0,200}")
"""Names of settings; those under `lr_scale` may be patterns"""
_OWN = ("output", "resume")
"""Settings that the studio makes itself"""
EVALUATION = "evaluation"
"""Name of the folder of a run's evaluation"""
_MAX_SETTINGS, _MAX_VALUE = 300, 20_000


class Trainings:
    """The trainings of a studio."""

    def __init__(self, settings: Settings, queue: Queue, commands: Commands) -> None:
        self._settings, self._queue, self._commands = settings, queue, commands
        self._rate = RateLimit(settings.limits.jobs_per_minute)
        self._naming = threading.Lock()

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

    def plan(self, recipe: str, settings: Mapping[str, Value]) -> Report:
        """Return what `diffgraft plan` says, which takes some seconds.

        Raises:
            DiffgraftError: as in `words`.
            TooManyJobsError: another command is being run.
        """
        return self._commands.run(("plan", *self.words(recipe, settings)))

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
        self._check_free(run, folder)
        self._count_job()
        allowed = ("--allow-changes",) if allow_changes else ()
        return self._queue.add(run, ("train", *words, "--resume", str(folder), *allowed, "--progress", "json"))

    def judge(self, run: str, strengths: Sequence[float], seeds: int) -> Job:
        """Queue the evaluation of a run: its adapters are drawn, measured and compared.

        Args:
            run: name of the run.
            strengths: strengths of each adapter.
            seeds: number of pictures of each prompt.

        Raises:
            DiffgraftError: there is no such run, it has no adapter, or it runs or waits already.
            TooManyJobsError: as in `start`.
        """
        folder = find_run(self._settings.root, run)
        self._check_free(run, folder)
        if not (folder / "adapter.safetensors").is_file():
            raise DiffgraftError(f"{run} has no adapter yet: wait until its training has ended.")
        self._count_job()
        given = ",".join(f"{strength:g}" for strength in strengths)
        output = str(folder / EVALUATION)
        words = ("--strengths", given, "--seeds", str(seeds), "--output", output, "--progress", "json")
        return self._queue.add(run, ("evaluate", str(folder), *words))

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

    def _check_free(self, run: str, folder: Path) -> None:
        if is_running(folder) or any(job.run == run for job in self._queue.jobs()):
            raise DiffgraftError(f"{run} runs or waits already.")

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
