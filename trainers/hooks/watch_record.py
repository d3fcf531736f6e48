"""The record of a watch: the loss of every picture of a run at fixed timesteps and noise, measured again and again."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, model_validator

from diffgraft.errors import DiffgraftError, one_line
from diffgraft.files import write_text
from diffgraft.strict import Strict

RECORD_NAME = "watch.json"
"""Name of the record's file in the folder of a run"""
_FINDINGS = "findings"
_ADVICE = "Runs with watch_every write it to watch.json in their folder: name that folder."
_LARGEST = 2**28
"""Bytes of a record that is read"""


class WatchedPicture(Strict):
    """A training or held-out picture whose loss is recorded during training."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Name of the picture, by which `picture_weights` calls it"""
    prompt: str
    """Prompt under which its loss is measured"""
    content: str = ""
    """SHA-256 of its file, of its mask and of its condition picture"""
    is_held_out: bool = False
    """Whether it is not trained on"""


class WatchRecord(Strict):
    """Losses and gains of every watched picture, at every measurement so far."""

    # a diverging run may have infinite losses, which JSON holds as text
    model_config = ConfigDict(frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")

    pictures: tuple[WatchedPicture, ...]
    near_duplicates: tuple[tuple[str, str], ...] = ()
    """Pairs of names of training pictures that are nearly the same"""
    steps: tuple[int, ...] = ()
    """Step of each measurement, ascending; at step 0 the adapter has its initial values"""
    losses: tuple[tuple[float, ...], ...] = ()
    """For each measurement the loss of each picture under its prompt"""
    gains: tuple[tuple[float, ...], ...] = ()
    """For each measurement the gain of each picture's prompt: the mean logarithm of errors under the empty prompt over
    those under its own"""

    @model_validator(mode="after")
    def _is_complete(self) -> "WatchRecord":
        """Check that each measurement has a loss and a gain for each picture."""
        for rows in (self.losses, self.gains):
            if len(rows) != len(self.steps) or any(len(row) != len(self.pictures) for row in rows):
                raise ValueError("the numbers of steps, losses and pictures do not match")
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("the steps are not in order")
        return self

    @property
    def trained(self) -> list[int]:
        """Indices of the pictures that are trained on."""
        return [index for index, picture in enumerate(self.pictures) if not picture.is_held_out]

    @property
    def held_out(self) -> list[int]:
        """Indices of the pictures that are held out."""
        return [index for index, picture in enumerate(self.pictures) if picture.is_held_out]

    def curve(self, index: int) -> list[float]:
        """Return the loss of a picture at each measurement."""
        return [row[index] for row in self.losses]

    def gain_curve(self, index: int) -> list[float]:
        """Return the gain of a picture's prompt at each measurement."""
        return [row[index] for row in self.gains]

    def with_measurement(self, step: int, losses: Sequence[float], gains: Sequence[float]) -> "WatchRecord":
        """Return the record with the figures of all pictures after `step` appended."""
        update = {
            "steps": (*self.steps, step),
            "losses": (*self.losses, tuple(losses)),
            "gains": (*self.gains, tuple(gains)),
        }
        return self.model_copy(update=update)

    def up_to(self, step: int) -> "WatchRecord":
        """Return the record without measurements after `step`."""
        count = sum(own <= step for own in self.steps)
        names = ("steps", "losses", "gains")
        return self.model_copy(update={name: getattr(self, name)[:count] for name in names})

    def has_same_pictures(self, other: "WatchRecord") -> bool:
        """Whether both records watch the same files under the same prompts, in the same order."""
        return [(own.content, own.prompt) for own in self.pictures] == [
            (own.content, own.prompt) for own in other.pictures
        ]


def log_ratio(first: float, second: float) -> float:
    """Return the logarithm of `first` over `second`; NaN if one of them is not positive and finite."""
    if 0 < first < math.inf and 0 < second < math.inf:
        return math.log(first / second)
    return math.nan


def write_record(record: WatchRecord, path: Path, findings: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write a record as JSON, atomically, with the findings at the end of a run."""
    content = json.loads(record.model_dump_json())
    if findings is not None:
        content[_FINDINGS] = findings
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> WatchRecord:
    """Read a record.

    Raises:
        DiffgraftError: the file is missing, too large, or not a record.
    """
    if not path.is_file():
        raise DiffgraftError(f"{path} does not exist: a run writes it if its recipe has watch_every=25 or the like.")
    if path.stat().st_size > _LARGEST:
        raise DiffgraftError(f"{path} is larger than {_LARGEST:,} bytes, the largest that a record may be.")
    try:
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            content.pop(_FINDINGS, None)  # they are computed from the rest
        return WatchRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DiffgraftError(
            f"{path} is not the record of a watch ({where}: {one_line(first['msg'], 100)}). {_ADVICE}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DiffgraftError(f"{path} is not the record of a watch ({one_line(error, 100)}). {_ADVICE}") from error
