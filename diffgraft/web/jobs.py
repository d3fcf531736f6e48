"""The queue: a folder of job files, of which a thread starts one after the other as processes of their own."""

import json
import os
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import diffgraft
from diffgraft.files import write_text
from diffgraft.web.files_of_runs import events_file, output_file
from diffgraft.web.polling import PollingThread
from diffgraft.web.processes import running_process
from diffgraft.web.settings import Settings


@dataclass(frozen=True)
class Job:
    """A training in the queue, waiting or started."""

    id: str
    """Name of its file; sorted, the ids are in the order of the queue"""
    run: str
    """Name of the folder of the run"""
    words: tuple[str, ...]
    """Arguments of the command `diffgraft`"""
    created: float
    """Time of the request, in seconds since 1970"""


class Queue:
    """The folders of waiting and of started jobs."""

    def __init__(self, folder: Path) -> None:
        self.waiting, self.started = folder / "queue", folder / "started"
        for each in (self.waiting, self.started):
            each.mkdir(parents=True, exist_ok=True)

    def add(self, run: str, words: tuple[str, ...]) -> Job:
        """Write a job for the run `run` to the end of the queue."""
        now = time.time()
        job = Job(f"{int(now * 1e6):017d}-{secrets.token_hex(4)}", run, words, now)
        write_text(self.file(job), json.dumps(asdict(job), ensure_ascii=False))
        return job

    def jobs(self) -> list[Job]:
        """Return the jobs that wait, in order. Damaged files are left out."""
        return _read(self.waiting)

    def started_jobs(self) -> list[Job]:
        """Return the jobs that were started and not yet forgotten."""
        return _read(self.started)

    def remove(self, job_id: str) -> bool:
        """Remove a waiting job; False if it does not wait, because it was started or is unknown."""
        job = next((job for job in self.jobs() if job.id == job_id), None)
        if job is None:
            return False
        try:
            self.file(job).unlink()
        except FileNotFoundError:
            return False
        return True

    def forget(self, job: Job) -> None:
        """Remove the file of a started job whose process has ended."""
        (self.started / f"{job.id}.json").unlink(missing_ok=True)

    def file(self, job: Job) -> Path:
        """Path of the file of a waiting job."""
        return self.waiting / f"{job.id}.json"


def _read(folder: Path) -> list[Job]:
    jobs = []
    for file in sorted(folder.glob("[0-9]*.json")):
        try:
            values = json.loads(file.read_text("utf-8"))
            run, words, created = values["run"], values["words"], float(values["created"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(run, str) and isinstance(words, list) and all(isinstance(word, str) for word in words):
            jobs.append(Job(file.stem, run, tuple(words), created))
    return jobs


class Scheduler(PollingThread):
    """Thread that starts the next job when no training runs.

    Trainings go on when it ends, with the server or by force; the next scheduler finds them by the files of their runs.
    """

    def __init__(self, settings: Settings, queue: Queue) -> None:
        super().__init__("studio-scheduler")
        self._settings, self._queue = settings, queue

    def look(self) -> None:
        """Forget what has ended, and start the next job if nothing runs."""
        for job in self._queue.started_jobs():
            if running_process(self._settings.root / job.run) is not None:
                return
            self._queue.forget(job)
        if jobs := self._queue.jobs():
            self._start(jobs[0])

    def _start(self, job: Job) -> None:
        run = self._settings.root / job.run
        events_file(run).parent.mkdir(parents=True, exist_ok=True)
        started = self._queue.started / f"{job.id}.json"
        launch = [sys.executable, "-m", "diffgraft.web.launch", str(self._queue.file(job)), str(started), str(run)]
        with events_file(run).open("ab") as events, output_file(run).open("ab") as output:
            subprocess.run(
                [*launch, *self._settings.command, *job.words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=events,
                cwd=self._settings.root,
                env=program_environment(),
                start_new_session=True,
                check=False,
            )
        with suppress(FileNotFoundError):  # the launch itself failed: without this it would be tried for ever
            self._queue.file(job).rename(started)


def program_environment() -> dict[str, str]:
    """Return the environment of programs that the studio starts in another folder, in which they find this library."""
    home = str(Path(diffgraft.__file__).parents[1])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
