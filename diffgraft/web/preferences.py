"""Pairs of a preferred and a rejected picture, in the folders that the recipe `preferences` learns from."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_write, write_text
from diffgraft.web.drawings import SHEET, Drawings
from diffgraft.web.settings import Settings

_TAG = re.compile(r"<\w+:[^<>]+>")


@dataclass(frozen=True)
class PreferencePair:
    """A preferred and a rejected picture of one prompt."""

    folder: str
    """Folder of the pairs"""
    name: str
    """Name of both files of the pair"""
    pairs: int
    """Number of pairs in the folder"""


class Preferences:
    """The pairs of a studio: ``preferences/NAME.png`` with its prompt, and ``preferences/rejected/NAME.png``."""

    def __init__(self, settings: Settings, drawings: Drawings) -> None:
        self.folder = settings.root / "preferences"
        """Folder of the preferred pictures"""
        self._drawings = drawings

    @property
    def count(self) -> int:
        """Number of preference pairs that were kept."""
        return sum(1 for _ in self.folder.glob("*.png"))

    def keep(self, better: str, worse: str) -> PreferencePair:
        """Copy two pictures of drawings, each ``ID/FILE``, as a pair; the same pair again takes the place of itself.

        Raises:
            DiffgraftError: they are the same picture, or differ in prompt or size, from which nothing can be learned.
        """
        if better == worse:
            raise DiffgraftError("A pair needs two different pictures: choose another one.")
        prompts, files = [], []
        for picture in (better, worse):
            drawing, _, name = picture.partition("/")
            if name == SHEET:
                raise DiffgraftError("A plot has many pictures: draw the two that you compare as pictures.")
            files.append(self._drawings.picture(drawing, name))
            prompts.append(" ".join(_TAG.sub("", self._drawings.one(drawing).request.prompt).split()))
        if prompts[0] != prompts[1]:
            raise DiffgraftError("The pictures have different prompts; both pictures of a pair must have the same.")
        if _size(files[0]) != _size(files[1]):
            raise DiffgraftError("The pictures have different sizes; both pictures of a pair must have the same.")
        name = "--".join(sorted(re.sub(r"[^\w-]", "-", one.removesuffix(".png")) for one in (better, worse)))
        (self.folder / "rejected").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{name}.txt", prompts[0] + "\n")
        _copy(files[1], self.folder / "rejected" / f"{name}.png")  # first: a picture without a partner is refused
        _copy(files[0], self.folder / f"{name}.png")
        return PreferencePair(str(self.folder), name, self.count)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as partial:
        shutil.copyfile(source, partial)


def _size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DiffgraftError(f"{file.name} cannot be read as a picture.") from error
