"""Picture files: opened as upright RGB images, with their masks, and converted to tensors."""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffgraft.errors import DiffgraftError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
)
"""Suffixes of picture files, compared in lower case"""
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "QOI")
"""Formats that are opened, whatever the file's name; Pillow knows more, and runs a program for one of them (EPS)"""
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats in which further frames are pictures; the second image of a phone's JPEG may be a depth map"""
_ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation"""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height"""
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_METADATA = 2**24
"""Bytes of a metadata chunk that is read at most"""
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold the orientation"""
_STRIP = 64
"""Rows of a picture that are converted at once"""


class UnreadablePictureError(DiffgraftError):
    """A picture file that cannot be decoded."""

    def __init__(self, name: str, cause: Exception) -> None:
        """Build the message from the picture's name and the exception of the decoder."""
        if isinstance(cause, Image.DecompressionBombError):
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            self.why = f"it claims more than {most / 1e6:.0f} million pixels"
        elif isinstance(cause, UnidentifiedImageError):
            self.why = "its content is of no known format"
        else:
            self.why = f"{cause or type(cause).__name__}"
        self.name = name
        super().__init__(f"{name} cannot be read as a picture ({self.why}). Save it again as JPEG or PNG.")


@dataclass(frozen=True)
class Picture:
    """One picture of a folder or a data set; it is decoded anew at each access."""

    name: str
    """Name for messages: the file's path relative to its folder"""
    read: Callable[[], bytes]
    """Function that returns the file's content"""
    captions: tuple[str, ...] = ()
    """Captions of the picture; several take turns"""
    mask_file: Path | None = None
    """Mask of the same size, white where the picture counts"""
    file: Path | None = None
    """Path of the picture if it is a file of its own; the size can then be read without the rest"""
    partner: "Picture | None" = None
    """The other picture of a pair, of the same size, such as one that this one is preferred to"""

    @property
    def image(self) -> Image.Image:
        """The decoded picture, upright, RGB, in its own size.

        Raises:
            UnreadablePictureError: the file is damaged, or not a picture.
        """
        with _decoding_errors(self.name):
            return upright_rgb(io.BytesIO(self.read()))

    @property
    def caption(self) -> str | None:
        """The picture's first caption, or None."""
        return self.captions[0] if self.captions else None

    @cached_property
    def content(self) -> str:
        """SHA-256 of the file's content."""
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def mask_content(self) -> str:
        """SHA-256 of the mask file's content; empty without a mask file."""
        return hashlib.sha256(self.mask_file.read_bytes()).hexdigest() if self.mask_file else ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, read from the file's header without decoding pixels.

        Raises:
            UnreadablePictureError: the file is not a picture.
        """
        return self._header[0]

    @property
    def is_animated(self) -> bool:
        """Whether the file holds further frames or pages, which `image` leaves out."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[tuple[int, int], bool]:
        with _decoding_errors(self.name), self._stream() as stream, open_image(_png_metadata(stream)) as file:
            # Pillow gives the upright size of a TIFF, and rotates it while decoding
            is_turned = file.format != "TIFF" and _orientation(file) in _SIDEWAYS
            is_animated = file.format in _ANIMATED and getattr(file, "is_animated", False)
            return (file.size[::-1] if is_turned else file.size), is_animated

    def _stream(self) -> IO[bytes]:
        return io.BytesIO(self.read()) if self.file is None else self.file.open("rb")

    @property
    def has_mask(self) -> bool:
        """Whether the picture has a mask file or an alpha channel."""
        if self.mask_file is not None:
            return True
        with _decoding_errors(self.name), self._stream() as stream, open_image(stream) as file:
            return bool(file.has_transparency_data)

    def mask(self) -> Image.Image | None:
        """Return the mask in mode L and the picture's size, from its file or the alpha channel; None without either.

        Raises:
            DiffgraftError: the mask file is not a picture, or has another aspect ratio.
        """
        if self.mask_file is None:
            with _decoding_errors(self.name), open_image(io.BytesIO(self.read())) as file:
                return _upright(file).convert("RGBA").getchannel("A") if file.has_transparency_data else None
        mask = read_picture(self.mask_file, "black").convert("L")
        if abs(mask.width * self.size[1] - mask.height * self.size[0]) > max(*mask.size, *self.size):
            raise DiffgraftError(
                f"The mask {self.mask_file.name} is {mask.width}x{mask.height}, but its picture is {self.size[0]}x"
                f"{self.size[1]}: give the mask the size of the picture."
            )
        return mask if mask.size == self.size else mask.resize(self.size, Image.Resampling.BILINEAR)


def read_picture(path: str | Path, background: str = "white") -> Image.Image:
    """Read a picture file as an upright RGB image, with transparency laid on the colour `background`.

    Raises:
        DiffgraftError: the file does not exist, or cannot be read as a picture.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DiffgraftError(f"The picture {path} does not exist.")
    with _decoding_errors(str(path)):
        return upright_rgb(path, background)


@contextmanager
def _decoding_errors(name: str) -> Iterator[None]:
    """Raise exceptions of decoders within the block as UnreadablePictureError with the picture's name."""
    try:
        yield
    except DiffgraftError:
        raise
    except Exception as error:  # decoders raise many kinds of exceptions for damaged files
        raise UnreadablePictureError(name, error) from error


@contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open a picture file by Pillow, without decoding its pixels.

    Pillow's warnings of damaged metadata and of large sizes, which cameras have, are suppressed.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as image:
        yield image


def upright_rgb(path: Path | IO[bytes], background: str = "white") -> Image.Image:
    """Decode a picture file as an upright RGB image, with transparency laid on the colour `background`."""
    with open_image(path) as file:
        image = _upright(file)
        if image.mode.startswith(("I", "F")):  # 16-bit and float grey: PIL's own conversion clips at 255
            grey = _grey_to_8_bit(image)
            image.close()  # its pixels take twice as much memory as those of the grey image
            return grey.convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
        return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 bits, 32 bits or floats to mode L, in strips so that copies need little memory.

    Images of 16 bits are scaled by 65535. Others do not state their range: it is 1, 255, 65535 or, for integers,
    2³¹ − 1, the smallest of these that holds all values (1 for floats alone).

    Raises:
        ValueError: the image has values that are not finite.
    """
    width, height = image.size
    strips = [(0, top, width, min(top + _STRIP, height)) for top in range(0, height, _STRIP)]
    if image.mode.startswith("I;16"):
        full_scale = 65535.0
    else:
        largest = float(np.max([np.asarray(image.crop(strip)).max(initial=0) for strip in strips]))
        if not np.isfinite(largest) or not all(np.isfinite(np.asarray(image.crop(strip))).all() for strip in strips):
            raise ValueError("it has values that are not finite")
        ranges = [1.0] * (image.mode == "F") + [255.0, 65535.0]
        full_scale = next((value for value in ranges if largest <= value), max(largest, 2.0**31 - 1))
    grey = Image.new("L", image.size)
    for strip in strips:
        values = np.asarray(image.crop(strip)).astype(np.float64)
        grey.paste(Image.fromarray((values / full_scale * 255).clip(0, 255).astype(np.uint8)), strip)
    return grey


def _upright(file: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF orientation, or as it is if its EXIF data are damaged."""
    try:
        file.load()
        ImageOps.exif_transpose(file, in_place=True)  # a copy would take as much memory again
        return file
    except (struct.error, LookupError, ValueError, SyntaxError, OverflowError):
        return file


def _orientation(file: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8 (other numbers have no meaning); 1 if there is none."""
    try:
        # the base class's method: the one for PNGs decodes the pixels to reach chunks behind them
        return int(Image.Image.getexif(file).get(_ORIENTATION, 1))
    except (struct.error, LookupError, ValueError, TypeError, SyntaxError, OverflowError):
        return 1


def _png_metadata(stream: IO[bytes]) -> IO[bytes]:
    """Return a PNG without its pixels, and with metadata chunks from behind them; any other file is returned as it is.

    A chunk is its content's length, four letters, the content and a checksum (PNG 1.2, section 3.2).
    """
    if stream.read(len(_PNG)) != _PNG:
        stream.seek(0)
        return stream
    chunks, is_behind = [_PNG], False
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            is_behind = True
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        if length > _MAX_METADATA:
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        rest = stream.read(length + 4)
        is_intact = zlib.crc32(kind + rest[:-4]) == int.from_bytes(rest[-4:], "big")
        if not is_behind or (kind in _PNG_METADATA and is_intact):
            chunks.append(head + rest)
    empty = b"\0\0\0\0IDAT"
    return io.BytesIO(b"".join([*chunks, empty, zlib.crc32(empty[4:]).to_bytes(4, "big")]))


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """Return the largest centred square of `image`, resized to `side` pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
