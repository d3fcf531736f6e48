"""Experiment trackers of accelerate (tensorboard, wandb, …), which receive the metrics and samples of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics
from diffgraft.trainers.state import TrainingState

_PROJECT = "diffgraft"
"""Project name in the trackers; for tensorboard, the folder inside `logs`"""


def check_trackers(names: Sequence[str]) -> None:
    """Check that accelerate knows these trackers and that their packages are installed.

    Custom trackers are registered with ``accelerate.tracking.register_tracker_class``.

    Raises:
        DiffgraftError: a tracker is unknown, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise DiffgraftError(f"Unknown tracker {name!r}: {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise DiffgraftError(f"The tracker {name} needs the package {name}: python -m pip install {name}")


class TrackersHook(Hook):
    """Sends metrics and samples to accelerate's trackers."""

    name = "trackers"

    def __init__(self, names: Sequence[str], config: Mapping[str, Any], metrics: Metrics) -> None:
        """`config` holds the run's settings by name, which trackers show beside its metrics."""
        self._names, self._config, self._metrics = names, config, metrics
        self._accelerator: Any = None

    def begin(self, state: TrainingState) -> None:
        """Initialize the trackers; on resume, purge later steps from tensorboard."""
        if not (self._names and state.is_main):
            return
        self._accelerator = state.accelerator
        options = {"tensorboard": {"purge_step": state.step + 1}} if state.step else {}
        config = (
            None
            if state.step
            else {name: _plain(value) for name, value in self._config.items() if value not in (None, "")}
        )
        self._accelerator.init_trackers(_PROJECT, None if state.step else config, options)
        self._metrics.listeners.append(self._log)

    def _log(self, entry: Mapping[str, float]) -> None:
        values = {name: value for name, value in entry.items() if name != "step"}
        self._accelerator.log(values, step=int(entry["step"]))

    def show_image(self, name: str, file: Path, step: int) -> None:
        """Send an image file to the trackers that accept images."""
        for tracker in self._accelerator.trackers if self._accelerator is not None else ():
            if not hasattr(tracker, "log_images"):
                continue
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: pixels if tracker.name in ("aim", "clearml") else [pixels]}, step=step)

    def close(self) -> None:
        """Flush and close the trackers; accelerate's ``end_training`` would also destroy the process group."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()
            self._accelerator.trackers.clear()


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | bool | int | float) else str(value)
