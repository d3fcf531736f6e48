"""Number of images in an epoch, if their folders can be read, and the number of steps that follows from it."""

import math
from dataclasses import dataclass
from pathlib import Path

from diffgraft.data.inventory import pictures_in


def count_pictures(folder: Path | None) -> int | None:
    """Number of image files in a folder; None if there is no such folder."""
    if folder is None or not folder.is_dir():
        return None
    return len(pictures_in(folder))


@dataclass(frozen=True)
class Epochs:
    """Converts counts of epochs in a configuration to counts of steps."""

    pictures: int | None
    """Number of images in an epoch, including repeats and class images; None if unknown"""
    batch: int
    """Images in a micro-batch"""
    accumulate: int
    """Micro-batches in an optimizer step"""

    def steps(self, epochs: float) -> int | None:
        """Number of optimizer steps in `epochs`; None if the number of images is unknown."""
        if not self.pictures:
            return None
        return max(1, math.ceil(epochs * math.ceil(math.ceil(self.pictures / self.batch) / self.accumulate)))

    def sum(self, epochs: float) -> str:
        """The calculation of `steps` as text, for the user to do or to check."""
        count = self.pictures or "images × repeats"
        return f"{epochs:g} epochs × {count} / batch {self.batch}" + (
            f" / accumulate {self.accumulate}" if self.accumulate > 1 else ""
        )
