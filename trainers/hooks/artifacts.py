"""Files that a run makes on the way: samples, adapters, and the plot of its losses."""

from collections.abc import Callable, Collection
from pathlib import Path

from diffgraft.generation.plots import save_loss_plot
from diffgraft.progress import Artifact, emit
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics, curves
from diffgraft.trainers.hooks.throttle import Throttle
from diffgraft.trainers.hooks.trackers import TrackersHook
from diffgraft.trainers.state import TrainingState


class PeriodicArtifact(Hook):
    """A file every so many steps, made with the values that are saved: samples, adapters.

    All processes make it together, as a denoiser in shards needs, and one writes.
    """

    def __init__(self, kind: str, every: int, file: Callable[[int], Path], make: Callable[[int, Path], None]) -> None:
        """`file` is the path of the artifact of a step, and `make` writes it; with `every` 0 it comes on request."""
        self.name, self.every = kind, every
        self._file, self._make = file, make
        self.request = ""
        """What it is asked for by through a `Control`; empty where it cannot be"""
        self.trackers: TrackersHook | None = None
        """Shown the file, where it is a picture"""

    def is_missed(self, state: TrainingState) -> bool:
        return state.is_due(self.every) and not self._file(state.step).exists()

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:
        return state.is_due(self.every) or self.request in asked

    def run(self, state: TrainingState) -> None:
        with state.eval_weights():
            self.write(state.step)

    def write(self, step: int) -> None:
        """Make the file of a step with the values that the parameters have now."""
        file = self._file(step)
        self._make(step, file)
        if file.exists():
            emit(Artifact(self.name, file, step))
            if self.trackers is not None:
                self.trackers.show_image(self.name, file, step)


class PlotHook(Hook):
    """Draws the losses while a run goes on, as often as takes a hundredth of its time, and where it is interrupted."""

    name = "plot"

    def __init__(self, file: Path, metrics: Metrics) -> None:
        self._file, self._metrics = file, metrics
        self._throttle = Throttle(self._draw)

    def begin(self, state: TrainingState) -> None:  # noqa: ARG002
        self._throttle = Throttle(self._draw)

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.is_main

    def run(self, state: TrainingState) -> None:  # noqa: ARG002
        self._throttle()

    def interrupted(self, state: TrainingState) -> None:
        if state.is_main and self._metrics.entries:
            self._draw()

    def _draw(self) -> None:
        save_loss_plot(curves(self._metrics.entries), self._file)
        emit(Artifact("plot", self._file))
