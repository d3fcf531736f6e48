"""Pictures, whatever people have: opened as upright RGB, with their masks; files of them, as tensors."""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffgraft.errors import DiffgraftError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
)
"""Names of pictures end so, in small letters or capitals"""
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "QOI")
"""What a picture's content may be, whatever its name: Pillow knows others, and runs a program for one (EPS)"""
_MOVING = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats whose further frames are others to look at; a telephone's JPEG may have a depth map behind its picture"""
_ORIENTATION = 0x0112
"""EXIF's tag for how the camera was turned"""
_SIDEWAYS = (5, 6, 7, 8)
"""Its values that let height and width change places"""
_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_NOTE = 2**24
"""Bytes of a chunk that is looked at"""
_PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may say how the camera was turned"""
_STRIP = 64
"""Rows of a picture that are worked on at once"""


class UnreadablePictureError(DiffgraftError):
    """A picture file that no decoder can make anything of."""

    def __init__(self, name: str, cause: Exception) -> None:
        """`name` is the picture's, `cause` what the decoder raised."""
        if isinstance(cause, Image.DecompressionBombError):
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            self.why = f"it claims more than {most / 1e6:.0f} million pixels"
        elif isinstance(cause, UnidentifiedImageError):
            self.why = "its content is of no format that is known here"
        else:
            self.why = f"{cause or type(cause).__name__}"
        self.name = name
        super().__init__(f"{name} cannot be read as a picture ({self.why}). Save it again as JPEG or PNG.")


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
    file: Path | None = None
    """Where it lies, if it is a file of its own: its size is then read without the rest of it"""

    @property
    def image(self) -> Image.Image:
        """The picture, upright, RGB, in its own size.

        Raises:
            UnreadablePictureError: it is damaged, or no picture.
        """
        with _told_of(self.name):
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

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright, as the file's header says it: no pixel is decoded.

        Raises:
            UnreadablePictureError: it is no picture.
        """
        return self._header[0]

    @property
    def moves(self) -> bool:
        """Whether its file holds further frames, of an animation or further pages, which `image` leaves out."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[tuple[int, int], bool]:
        with _told_of(self.name), self._stream() as stream, opened(_notes_first(stream)) as file:
            # of a TIFF Pillow gives the upright size, and turns it as it decodes
            turned = file.format != "TIFF" and _orientation(file) in _SIDEWAYS
            moves = file.format in _MOVING and getattr(file, "is_animated", False)
            return (file.size[::-1] if turned else file.size), moves

    def _stream(self) -> IO[bytes]:
        return io.BytesIO(self.read()) if self.file is None else self.file.open("rb")

    @property
    def has_mask(self) -> bool:
        """Whether `mask` has one to give."""
        if self.mask_file is not None:
            return True
        with _told_of(self.name), self._stream() as stream, opened(stream) as file:
            return bool(file.has_transparency_data)

    def mask(self) -> Image.Image | None:
        """Where it counts, in mode L and its own size: the mask file's, or its alpha channel; None without either.

        Raises:
            DiffgraftError: the mask is no picture, or has another shape.
        """
        if self.mask_file is None:
            with _told_of(self.name), opened(io.BytesIO(self.read())) as file:
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
    with _told_of(str(path)):
        return upright_rgb(path, ground)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """What a decoder raises within the block, told with the picture's name."""
    try:
        yield
    except DiffgraftError:
        raise
    except Exception as error:  # what the decoders stumble over in a damaged file is of many kinds
        raise UnreadablePictureError(name, error) from error


@contextmanager
def opened(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """A picture file as Pillow opens it, its pixels not yet decoded.

    Pillow's warnings are left out: those of damaged notes beside the pixels, and of sizes that cameras have.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as found:
        yield found


def upright_rgb(path: Path | IO[bytes], ground: str = "white") -> Image.Image:
    """One picture file as an upright RGB image, what is transparent in it laid on `ground`."""
    with opened(path) as file:
        image = _upright(file)
        if image.mode.startswith(("I", "F")):  # 16-bit and float grey: PIL's own conversion clips at 255
            return _in_eight_bits(np.asarray(image)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
        return image.convert("RGB")


def _in_eight_bits(values: np.ndarray) -> Image.Image:
    """Grey values [h, w] up to 255 or 65535 as an image, in strips: 8 bytes for every pixel would be gigabytes."""
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    found = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _STRIP):
        strip = values[start : start + _STRIP].astype(np.float64)
        found[start : start + _STRIP] = (strip / top * 255).clip(0, 255)
    return Image.fromarray(found)


def _upright(file: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it lies where that cannot be read (the pixels are whole all the same)."""
    try:
        return ImageOps.exif_transpose(file)
    except (struct.error, LookupError, ValueError, SyntaxError, OverflowError):
        file.load()
        return file.copy()


def _orientation(file: Image.Image) -> int:
    """1 to 8, as EXIF has it (other numbers mean nothing); 1 where nothing is said."""
    try:
        # the plain method: that of PNGs decodes the pixels, for what may stand behind them
        return int(Image.Image.getexif(file).get(_ORIENTATION, 1))
    except (struct.error, LookupError, ValueError, TypeError, SyntaxError, OverflowError):
        return 1


def _notes_first(stream: IO[bytes]) -> IO[bytes]:
    """A PNG without its pixels, what is noted behind them put in front; any other file as it is.

    A chunk is its content's length, four letters, the content and a checksum (PNG 1.2, section 3.2).
    """
    if stream.read(len(_PNG)) != _PNG:
        stream.seek(0)
        return stream
    kept, is_behind = [_PNG], False
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            is_behind = True
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        if length > _LONGEST_NOTE:
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        rest = stream.read(length + 4)
        is_whole = zlib.crc32(kind + rest[:-4]) == int.from_bytes(rest[-4:], "big")
        if not is_behind or (kind in _PNG_NOTES and is_whole):
            kept.append(head + rest)
    empty = b"\0\0\0\0IDAT"
    return io.BytesIO(b"".join([*kept, empty, zlib.crc32(empty[4:]).to_bytes(4, "big")]))


def square(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square of `image`, scaled to `side` pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size → float32 [n, 3, h, w] in -1..1."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
