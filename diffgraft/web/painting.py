"""The watch over the program that draws: it is started when something waits, and missed when it ends early."""

import subprocess
from pathlib import Path

from diffgraft.web.drawings import Drawings
from diffgraft.web.files_of_runs import output_file
from diffgraft.web.jobs import program_environment
from diffgraft.web.polling import PollingThread
from diffgraft.web.processes import running_process
from diffgraft.web.settings import Settings

_ENDED = "The program that draws has ended unexpectedly{}. Draw again; smaller sizes need less memory."


class PainterWatch(PollingThread):
    """Thread that starts the program that draws when a drawing waits, and notes drawings that it left undone."""

    def __init__(self, settings: Settings, drawings: Drawings) -> None:
        super().__init__("studio-painter")
        self._settings, self._drawings = settings, drawings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """Folder of what is known of the program."""
        return self._settings.state_folder / "painter"

    def look(self) -> None:
        """Note what an ended program left undone, and start one if something waits."""
        status = None
        if self._process is not None:
            if (status := self._process.poll()) is None:
                return
            self._process = None
        elif running_process(self.folder) is not None:  # an earlier server started it
            return
        queue = self._drawings.queue
        left = queue.started_jobs()
        if status and not left:  # it could not even begin: the next one would not, either
            left = [job for job in queue.jobs()[:1] if queue.remove(job.id)]
        for job in left:
            self._drawings.give_up(job, _ENDED.format(f" (status {status})" if status else ""))
            queue.forget(job)
        if queue.jobs() or self._drawings.is_wanted.is_set():
            self._drawings.is_wanted.clear()
            self._start()

    def end(self) -> None:
        """End the thread, and the program if it draws nothing; else it ends by itself when it has drawn what waits."""
        super().end()
        if self._process is not None and not self._drawings.queue.started_jobs():
            self._process.terminate()
            self._process.wait()

    def _start(self) -> None:
        output = output_file(self.folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [*self._settings.painter, str(self._settings.root)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self._settings.root,
                env=program_environment(),
                start_new_session=True,
            )
