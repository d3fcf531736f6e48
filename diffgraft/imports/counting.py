"""How many pictures a round has, where their folders can be read, and so how many steps an epoch."""

import math
from dataclasses import dataclass
from pathlib import Path

from diffgraft.data.inventory import pictures_in


def count_pictures(folder: Path | None) -> int | None:
    """Picture files in a folder; None where it cannot be read."""
    if folder is None or not folder.is_dir():
        return None
    return len(pictures_in(folder))


@dataclass(frozen=True)
class Epochs:
    """What turns epochs into steps."""

    pictures: int | None
    """In an epoch, repeats and class images counted; None where it is not known"""
    batch: int
    accumulate: int

    def steps(self, epochs: float) -> int | None:
        """Optimiser steps in so many epochs; None where it is not known."""
        if not self.pictures:
            return None
        return max(1, math.ceil(epochs * math.ceil(math.ceil(self.pictures / self.batch) / self.accumulate)))

    def sum(self, epochs: float) -> str:
        """The sum in words, for a person to do or to check."""
        count = self.pictures or "pictures × repeats"
        return f"{epochs:g} epochs × {count} / batch {self.batch}" + (
            f" / accumulate {self.accumulate}" if self.accumulate > 1 else ""
        )
