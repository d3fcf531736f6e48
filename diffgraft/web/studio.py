"""The parts of a studio, which its routes share."""

from dataclasses import dataclass

from diffgraft.web.commands import Commands
from diffgraft.web.drawings import Drawings
from diffgraft.web.events import EventStreams
from diffgraft.web.guard import Door
from diffgraft.web.jobs import Queue
from diffgraft.web.library import RunSummary, run_folders, summarize
from diffgraft.web.operations import Operations
from diffgraft.web.pictures import Pictures
from diffgraft.web.preferences import Preferences
from diffgraft.web.settings import Settings
from diffgraft.web.training import Trainings


@dataclass(frozen=True)
class Studio:
    """The parts of a studio; none holds state that its files do not."""

    settings: Settings
    queue: Queue
    trainings: Trainings
    pictures: Pictures
    operations: Operations
    drawings: Drawings
    preferences: Preferences
    streams: EventStreams
    door: Door

    @classmethod
    def open(cls, settings: Settings) -> "Studio":
        """Open the studio of a library folder, which is created if it does not exist."""
        settings.root.mkdir(parents=True, exist_ok=True)
        queue, drawings, commands = Queue(settings.state_folder), Drawings(settings), Commands(settings)
        return cls(
            settings,
            queue,
            Trainings(settings, queue, commands),
            Pictures(settings),
            Operations(settings, commands),
            drawings,
            Preferences(settings, drawings),
            EventStreams(settings.limits.viewers),
            Door(settings),
        )

    def runs(self) -> list[RunSummary]:
        """Return summaries of all runs, the newest first."""
        waiting = self.waiting()
        return [summarize(folder, waiting) for folder in run_folders(self.settings.root)]

    def waiting(self) -> set[str]:
        """Return the names of the runs in the queue, and of those whose process may not be noted yet."""
        waiting = self.queue.jobs()  # before those that were started, as a job only moves there
        return {job.run for job in (*waiting, *self.queue.started_jobs())}
