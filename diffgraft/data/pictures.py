"""Pictures, whatever people have: opened as upright RGB, with their masks; files of them, as tensors."""

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffgraft.errors import DiffgraftError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ORIENTATION = 0x0112
"""EXIF's tag for how the camera was turned"""


@dataclass(frozen=True)
class Picture:
    """One picture of a folder or a data set, opened each time it is asked for."""

    name: str
    """What to call it: the file's name, below its folder"""
    read: Callable[[], bytes]
    """The file's content"""
    captions: tuple[str, ...] = ()
    """What stands beside it; none, one, or several that take turns"""
    mask_file: Path | None = None
    """A picture of the same size, white where this one counts"""

    @property
    def image(self) -> Image.Image:
        """Upright, RGB, in its own size."""
        return upright_rgb(io.BytesIO(self.read()))

    @property
    def caption(self) -> str | None:
        """The first of its captions."""
        return self.captions[0] if self.captions else None

    @cached_property
    def content(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def mask_content(self) -> str:
        """SHA-256 of the mask's file; empty without one."""
        return hashlib.sha256(self.mask_file.read_bytes()).hexdigest() if self.mask_file else ""

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height), upright; read from the file's first bytes alone."""
        with Image.open(io.BytesIO(self.read())) as file:
            turned = _orientation(file) >= 5
            return file.size[::-1] if turned else file.size

    def mask(self) -> Image.Image | None:
        """Where it counts, in mode L and its own size: the mask file's, or its alpha channel; None without either.

        Raises:
            DiffgraftError: the mask is no picture, or has another shape.
        """
        if self.mask_file is None:
            with Image.open(io.BytesIO(self.read())) as file:
                return _upright(file).convert("RGBA").getchannel("A") if file.has_transparency_data else None
        mask = read_picture(self.mask_file, "black").convert("L")
        if abs(mask.width * self.size[1] - mask.height * self.size[0]) > max(*mask.size, *self.size):
            raise DiffgraftError(
                f"The mask {self.mask_file.name} is {mask.width}x{mask.height} and its picture {self.size[0]}x"
                f"{self.size[1]}: make it as large as the picture."
            )
        return mask if mask.size == self.size else mask.resize(self.size, Image.Resampling.BILINEAR)


def read_picture(path: str | Path, ground: str = "white") -> Image.Image:
    """One picture file as an upright RGB image, what is transparent in it laid on `ground`.

    Raises:
        DiffgraftError: there is no such file, or it is no picture that can be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DiffgraftError(f"There is no picture {path}.")
    try:
        return upright_rgb(path, ground)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DiffgraftError(f"{path} cannot be read as a picture ({error}). Give a JPEG, PNG or WebP file.") from error


def upright_rgb(path: Path | IO[bytes], ground: str = "white") -> Image.Image:
    """One picture file as an upright RGB image, what is transparent in it laid on `ground`."""
    # Pillow's remarks on damaged notes beside the pixels are left out
    with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as file:
        image = _upright(file)
        if image.mode.startswith(("I", "F")):  # 16-bit and float grey: PIL's own conversion clips at 255
            values = np.asarray(image, dtype=np.float64)
            top = 65535.0 if values.max() > 255 else 255.0
            return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
        return image.convert("RGB")


def _upright(file: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it lies where that cannot be read (the pixels are whole all the same)."""
    try:
        return ImageOps.exif_transpose(file)
    except (struct.error, LookupError, ValueError, SyntaxError, OverflowError):
        file.load()
        return file.copy()


def _orientation(file: Image.Image) -> int:
    """1 to 8, as EXIF has it; from 5 on, height and width change places."""
    try:
        return int(file.getexif().get(_ORIENTATION, 1))
    except (struct.error, LookupError, ValueError, TypeError, SyntaxError, OverflowError):
        return 1


def square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square of `image`, scaled to `side` pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size → float32 [n, 3, h, w] in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
