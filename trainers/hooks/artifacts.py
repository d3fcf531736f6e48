"""Files that a run writes while it trains: samples, adapters, and the plot of its losses."""

from collections.abc import Callable, Collection
from pathlib import Path

from diffgraft.generation.plots import save_loss_plot
from diffgraft.progress import Artifact, emit
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics, loss_curves
from diffgraft.trainers.hooks.throttle import Throttle
from diffgraft.trainers.hooks.trackers import TrackersHook
from diffgraft.trainers.state import TrainingState


class PeriodicArtifact(Hook):
    """Writes a file (samples, an adapter) every `every` steps, with the values that are saved, such as the EMA's.

    All processes run it together, since a sharded denoiser needs all of them; only the main process writes.
    """

    def __init__(self, kind: str, every: int, file: Callable[[int], Path], make: Callable[[int, Path], None]) -> None:
        """Store what to write, and when.

        Args:
            kind: name of the artifact in events and trackers, such as `samples`.
            every: steps between files; with 0 they are written on request alone.
            file: maps a step to the path of the artifact written at that step.
            make: writes the artifact of a step to a path.
        """
        self.name, self.every = kind, every
        self._file, self._make = file, make
        self.request = ""
        """Name of the request to a `Control` that triggers this artifact, such as `sample`; empty if there is none"""
        self.trackers: TrackersHook | None = None
        """Trackers that are shown the file, if it is an image"""

    def is_overdue(self, state: TrainingState) -> bool:
        return state.is_due(self.every) and not self._file(state.step).exists()

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:
        return state.is_due(self.every) or self.request in asked

    def run(self, state: TrainingState) -> None:
        with state.eval_weights():
            self.write(state.step)

    def write(self, step: int) -> None:
        """Write the artifact of a step with the current values of the parameters."""
        file = self._file(step)
        self._make(step, file)
        if file.exists():
            emit(Artifact(self.name, file, step))
            if self.trackers is not None:
                self.trackers.show_image(self.name, file, step)


class PlotHook(Hook):
    """Plots the losses while a run trains, using at most 1 % of its time, and when the run is interrupted."""

    name = "plot"

    def __init__(self, file: Path, metrics: Metrics) -> None:
        self._file, self._metrics = file, metrics
        self._throttle = Throttle(self._plot)

    def begin(self, state: TrainingState) -> None:  # noqa: ARG002
        self._throttle = Throttle(self._plot)

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.is_main

    def run(self, state: TrainingState) -> None:  # noqa: ARG002
        self._throttle()

    def interrupted(self, state: TrainingState) -> None:
        if state.is_main and self._metrics.entries:
            self._plot()

    def _plot(self) -> None:
        save_loss_plot(loss_curves(self._metrics.entries), self._file)
        emit(Artifact("plot", self._file))
