"""Trackers of accelerate (tensorboard, wandb, …): they are shown what is recorded, and the samples."""

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
"""What the run is filed under; of tensorboard, the folder inside `logs`"""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not there.

    Those of one's own it knows by ``accelerate.tracking.register_tracker_class``.

    Raises:
        DiffgraftError: there is one; it is named.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise DiffgraftError(f"There is no tracker {name!r}: {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise DiffgraftError(f"The tracker {name} needs its package: python -m pip install {name}")


class TrackersHook(Hook):
    """Shows accelerate's trackers what is recorded, and the samples."""

    name = "trackers"

    def __init__(self, names: Sequence[str], config: Mapping[str, Any], metrics: Metrics) -> None:
        """`config` is what the run was made with, as plain values by name."""
        self._names, self._config, self._metrics = names, config, metrics
        self._accelerator: Any = None

    def begin(self, state: TrainingState) -> None:
        """Begin or, after some steps, go on where tensorboard is; what it had of later steps is purged."""
        if not (self._names and state.is_main):
            return
        self._accelerator = state.accelerator
        more = {"tensorboard": {"purge_step": state.step + 1}} if state.step else {}
        config = (
            None
            if state.step
            else {name: _plain(value) for name, value in self._config.items() if value not in (None, "")}
        )
        self._accelerator.init_trackers(_PROJECT, None if state.step else config, more)
        self._metrics.listeners.append(self._show)

    def _show(self, entry: Mapping[str, float]) -> None:
        values = {name: value for name, value in entry.items() if name != "step"}
        self._accelerator.log(values, step=int(entry["step"]))

    def show_image(self, name: str, file: Path, step: int) -> None:
        """Show a picture to the trackers that take any; each takes it in its own way."""
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
        """Have them write what they still hold; accelerate's own ``end_training`` would part the processes, too."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()
            self._accelerator.trackers.clear()


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | bool | int | float) else str(value)
