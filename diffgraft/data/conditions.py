"""Condition pictures of training images: their edges, or files with the same names in another folder."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffgraft.data.frames import Crop
from diffgraft.data.inventory import list_names
from diffgraft.data.pictures import SUFFIXES, Picture, UnreadablePictureError, read_picture
from diffgraft.data.settings import Conditions
from diffgraft.edges import edges
from diffgraft.errors import DiffgraftError
from diffgraft.pixels import to_tensor


@dataclass(frozen=True)
class ConditionPicture:
    """The condition picture of a training image.

    Files are read anew at each access, so that thousands need no memory; edges are made once, and kept in a few
    kilobytes.
    """

    picture: Picture
    """The training image"""
    file: Path | None = None
    """File of the condition picture, of the same aspect ratio; None: the edges of the training image"""
    _made: dict[Crop, bytes] = field(default_factory=dict, repr=False)
    """Crop → its edges, one bit for each pixel, compressed"""

    def crop(self, frame: Crop) -> Tensor:
        """Return the same crop as of the training image, mirrored as it is: [3, height, width], values from 0 to 1.

        Edges are those of the crop, at its resolution, as a user will have them for drawing.

        Raises:
            DiffgraftError: the picture cannot be read.
        """
        if self.file is None:
            return self._edges(frame).expand(3, -1, -1)
        image = read_picture(self.file, "black")
        condition = frame.crop(image if image.size == frame.original else image.resize(frame.original))
        return to_tensor([condition])[0] / 2 + 0.5

    def _edges(self, frame: Crop) -> Tensor:
        """Return the edges of a crop, [height, width] with the values 0 and 1."""
        if frame not in self._made:
            lines = np.asarray(edges(frame.crop(self.picture.image)).convert("L")) > 0
            self._made[frame] = zlib.compress(np.packbits(lines).tobytes())
        width, height = frame.size
        packed = np.frombuffer(zlib.decompress(self._made[frame]), np.uint8)
        return torch.from_numpy(np.unpackbits(packed, count=width * height).reshape(height, width)).float()

    @property
    def content(self) -> str:
        """SHA-256 of the file's content; empty for edges, which depend on the training image alone."""
        return "" if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest()

    def check(self) -> None:
        """Check that the file is a picture with the training image's aspect ratio, by its header.

        Raises:
            DiffgraftError: it is not.
        """
        if self.file is None:
            return
        width, height = Picture(str(self.file), self.file.read_bytes, file=self.file).size
        own = self.picture.size
        if abs(width * own[1] - height * own[0]) > max(width, height, *own):
            raise DiffgraftError(
                f"The condition picture {self.file} is {width}x{height}, but its training image {self.picture.name} is "
                f"{own[0]}x{own[1]}: give both the same size, or at least the same aspect ratio."
            )


def condition_pictures(pictures: Sequence[Picture], settings: Conditions) -> list[ConditionPicture]:
    """Return the condition picture of each training image.

    Raises:
        DiffgraftError: the folder or a file is missing, a file is not a picture or of another aspect ratio, or two
            training images have the same name.
    """
    if not settings.images:
        return [ConditionPicture(picture) for picture in pictures]
    folder = Path(settings.images).expanduser()
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DiffgraftError(f"The folder control.images={folder} {problem}. Give a folder of condition pictures.")
    files = dict(_by_name(folder))
    named = [Path(picture.name).with_suffix("").as_posix() for picture in pictures]
    if missing := [picture.name for picture, name in zip(pictures, named, strict=True) if name not in files]:
        raise DiffgraftError(
            f"control.images={folder} has no condition picture for {list_names(missing)}: put one there for each "
            "training image, with the same name and any suffix of pictures."
        )
    found = [ConditionPicture(picture, files[name]) for picture, name in zip(pictures, named, strict=True)]
    for condition in found:
        if (
            condition.picture.file is not None
            and condition.file is not None
            and condition.file.samefile(condition.picture.file)
        ):
            raise DiffgraftError(
                f"control.images={folder} is the folder of the training images: give a folder of condition pictures, "
                "or set control.by=edges."
            )
        try:
            condition.check()
        except UnreadablePictureError as error:
            raise DiffgraftError(f"The condition picture {error}") from error
    return found


def check_unshared(conditions: Sequence[ConditionPicture]) -> None:
    """Check that no file is the condition picture of different training images, as of folders with the same names.

    Raises:
        DiffgraftError: one is.
    """
    owners: dict[Path, Picture] = {}
    for condition in conditions:
        if condition.file is None:
            continue
        other = owners.setdefault(condition.file, condition.picture)
        if other.content != condition.picture.content:
            raise DiffgraftError(
                f"{condition.file} would be the condition picture of two different training images: give the images of "
                "different folders different names."
            )


def _by_name(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield path inside the folder without suffix, and path, of each picture file below a folder."""
    for path in sorted(folder.rglob("*"), reverse=True):  # the first of several suffixes counts
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path.relative_to(folder).with_suffix("").as_posix(), path
