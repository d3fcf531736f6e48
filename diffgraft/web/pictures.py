"""Folders of training pictures: listed, shown, uploaded and captioned."""

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from diffgraft.data.inventory import CAPTIONS
from diffgraft.data.pictures import SUFFIXES, read_picture
from diffgraft.errors import DiffgraftError
from diffgraft.files import PARTIAL, atomic_write, write_text
from diffgraft.web.paths import UnknownPathError, confined, safe_name, within
from diffgraft.web.settings import Settings

_MAX_CAPTION = 20_000
_SIDE = 320
"""Longest side of a picture as it is shown, in pixels"""
_MAX_FOLDERS = 200
_PIECE = 2**20
_decoding = threading.BoundedSemaphore(2)
"""A large picture takes a gigabyte while it is decoded"""


@dataclass(frozen=True)
class PictureFolder:
    """A folder of training pictures, as the studio lists it."""

    path: str
    name: str
    """Path below the folder of the studio that it is in"""
    pictures: int
    is_upload: bool
    """Whether it holds uploaded pictures"""


@dataclass(frozen=True)
class CaptionedPicture:
    """A training picture of a folder, with its caption."""

    file: str
    name: str
    caption: str | None
    can_change: bool
    """Whether it was uploaded, so that its caption can be changed"""


class Pictures:
    """Pictures in the folders of a studio."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders = (settings.uploads, *settings.folders)

    def folders(self) -> list[PictureFolder]:
        """Return the uploads, and the folders with pictures at most two levels below the further folders."""
        found = []
        for top in self._folders:
            for folder in _below(top, 2):
                if count := sum(1 for _ in _picture_files(folder)):
                    name = folder.relative_to(top).as_posix()
                    is_upload = top == self._settings.uploads
                    found.append(PictureFolder(str(folder), top.name if name == "." else name, count, is_upload))
        return found[:_MAX_FOLDERS]

    def listed(self, folder: str) -> list[CaptionedPicture]:
        """Return the pictures of a folder with the captions beside them, ordered by name.

        Raises:
            DiffgraftError: it is not a folder of the studio.
        """
        path = within(self._tops(), folder)
        if not path.is_dir():
            raise DiffgraftError(f"{folder[:200]!r} is a file, not a folder of pictures.")
        is_upload = path.is_relative_to(self._settings.uploads.resolve())
        return [CaptionedPicture(str(file), file.name, _caption(file), is_upload) for file in _picture_files(path)]

    def thumbnail(self, file: str) -> bytes:
        """Return a picture, small, as WebP.

        Raises:
            DiffgraftError: it is not a picture in a folder of the studio.
        """
        path = within(self._tops(), file)
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise UnknownPathError(f"{file[:200]!r} is not a picture.")
        with _decoding:
            image = read_picture(path)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "WEBP", quality=85)
        return content.getvalue()

    def upload(self, folder: str, files: Sequence[tuple[str, BinaryIO]]) -> tuple[str, list[str]]:
        """Write uploaded pictures and caption files to the upload `folder`, which may be new.

        Args:
            folder: name of the folder.
            files: name and content of each file.

        Returns:
            Path of the folder; and for each file that was refused, a sentence.

        Raises:
            DiffgraftError: too many files.
        """
        if len(files) > self._settings.limits.files:
            raise DiffgraftError(
                f"There are {len(files)} files; at most {self._settings.limits.files} are taken at once."
            )
        top = self._settings.uploads / safe_name(folder, "pictures")
        if top.is_symlink():
            raise UnknownPathError(f"The folder {top.name} is a link: choose another name.")
        top.mkdir(parents=True, exist_ok=True)
        refusals = []
        for name, content in files:
            try:
                self._store(top, name, content)
            except DiffgraftError as error:
                refusals.append(str(error))
        with suppress(OSError):  # it holds something
            top.rmdir()
        return str(top), refusals

    def set_caption(self, file: str, caption: str) -> None:
        """Write the caption of an uploaded picture beside it.

        Raises:
            DiffgraftError: it is not an uploaded picture, or the caption is too long.
        """
        path = confined(self._settings.uploads, file)
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise UnknownPathError(f"{file[:200]!r} is not a picture.")
        if len(caption) > _MAX_CAPTION or "\0" in caption:
            raise DiffgraftError(f"The caption is longer than {_MAX_CAPTION} characters.")
        write_text(path.with_suffix(".txt"), caption.strip() + "\n")

    def _tops(self) -> tuple[Path, ...]:
        return self._settings.root, *self._settings.folders

    def _store(self, folder: Path, name: str, content: BinaryIO) -> None:
        base = name.replace("\\", "/").rpartition("/")[2]
        suffix = Path(base).suffix.lower()
        target = folder / (safe_name(Path(base).stem, "picture") + suffix)
        most = self._settings.limits.file if suffix in SUFFIXES else 4 * _MAX_CAPTION
        if suffix not in (*SUFFIXES, *CAPTIONS):
            raise DiffgraftError(f"{base[:100]!r} is neither a picture nor a caption file (.txt): it is left out.")
        with atomic_write(target) as partial:
            written = 0
            with partial.open("wb") as file:
                while piece := content.read(_PIECE):
                    written += len(piece)
                    if written > most:
                        raise DiffgraftError(f"{base[:100]!r} is larger than {most:,} bytes: it is left out.")
                    file.write(piece)
            if suffix in SUFFIXES:
                _check_picture(partial, base)
            else:
                _check_text(partial, base)


def _check_picture(path: Path, name: str) -> None:
    try:
        with _decoding:
            read_picture(path)
    except DiffgraftError as error:
        raise DiffgraftError(f"{name[:100]!r} cannot be read as a picture: it is left out.") from error


def _check_text(path: Path, name: str) -> None:
    try:
        path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{name[:100]!r} is not UTF-8 text: it is left out.") from error


def _caption(file: Path) -> str | None:
    """Return the caption in the text file beside a picture; None without one, or if it leads elsewhere."""
    for suffix in CAPTIONS:
        beside = file.with_suffix(suffix)
        if beside.is_file() and not beside.is_symlink() and beside.stat().st_size <= 4 * _MAX_CAPTION:
            return beside.read_text("utf-8-sig", errors="replace").strip()
    return None


def _picture_files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        hidden = path.name.startswith((".", PARTIAL))
        if path.suffix.lower() in SUFFIXES and not hidden and not path.is_symlink() and path.is_file():
            yield path


def _below(top: Path, levels: int) -> Iterator[Path]:
    """Yield `top` and the folders below it, but for hidden ones and links."""
    if not top.is_dir():
        return
    yield top
    if levels:
        for path in sorted(top.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _below(path, levels - 1)
