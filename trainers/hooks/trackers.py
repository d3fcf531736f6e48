"""Trackers of accelerate (tensorboard, wandb, …): they are shown what is recorded, and the samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffgraft.errors import DiffgraftError, nearest
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import flat

_PROJECT = "diffgraft"
"""What the run is filed under; of tensorboard, the folder inside `logs`"""


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not there.

    Those of one's own it knows by ``accelerate.tracking.register_tracker_class``.

    Raises:
        DiffgraftError: there is one; it is named.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in recipe.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise DiffgraftError(f"There is no tracker {name!r}: {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise DiffgraftError(f"The tracker {name} needs its package: python -m pip install {name}")


def start_trackers(accelerator: Any, recipe: Recipe, done: int) -> None:
    """Begin, or after `done` steps go on where tensorboard is; what it had of later steps is purged."""
    if not recipe.trackers:
        return
    said = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if value not in (None, "")}
    plain = {key: value if isinstance(value, str | bool | int | float) else str(value) for key, value in said.items()}
    more = {"tensorboard": {"purge_step": done + 1}} if done else {}
    accelerator.init_trackers(_PROJECT, None if done else plain, more)


def track(accelerator: Any, entry: Mapping[str, float]) -> None:
    """Show them an entry of the record."""
    values = {name: value for name, value in entry.items() if name != "step"}
    accelerator.log(values, step=int(entry["step"]))


def track_picture(accelerator: Any, name: str, file: Path, step: int) -> None:
    """Show a picture to those that take any; each takes it in its own way."""
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: pixels if tracker.name in ("aim", "clearml") else [pixels]}, step=step)


def end_trackers(accelerator: Any) -> None:
    """Let them write what they still hold; accelerate's own ``end_training`` would part the processes, too."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
