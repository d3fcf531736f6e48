"""Pictures from a folder: whatever people have there, as upright RGB squares."""

import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffgraft.errors import DiffgraftError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Picture:
    """One picture of a folder."""

    path: Path
    image: Image.Image
    """Upright, RGB, in its own size."""
    caption: str | None
    """The text of the ``.txt`` file beside it, if there is one."""


def read_folder(folder: str | Path) -> list[Picture]:
    """All JPEG, PNG and WebP pictures of `folder`, in the order of their names.

    Pictures are turned upright (EXIF), transparency is laid on white, and grey, CMYK and palette pictures become RGB.
    A file that cannot be read is named in a warning and left out.

    Raises:
        DiffgraftError: there is no such folder, or no readable picture in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DiffgraftError(f"The picture folder {folder} {what}. Give a folder of JPEG, PNG or WebP pictures.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    pictures = []
    for path in paths:
        try:
            image = upright_rgb(path)
        except Exception as error:  # what the decoders stumble over in a damaged file is of many kinds
            warnings.warn(f"{path.name} is left out: it cannot be read as a picture ({error}).", stacklevel=2)
            continue
        pictures.append(Picture(path, image, _caption(path.with_suffix(".txt"))))
    if not pictures:
        found = f"none of its {len(paths)} picture files can be read" if paths else "it holds no picture files"
        raise DiffgraftError(f"No picture was found in {folder}: {found}. Put JPEG, PNG or WebP pictures there.")
    return pictures


def _caption(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise DiffgraftError(
            f"The caption {path} is not written in UTF-8 ({error.reason}). Save it as UTF-8."
        ) from error


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


def upright_rgb(path: Path, ground: str = "white") -> Image.Image:
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


def square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square of `image`, scaled to `side` pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size → float32 [n, 3, h, w] in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
