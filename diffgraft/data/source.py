"""Where pictures come from: a folder, with captions in the ways people keep them, or a data set of `datasets`."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffgraft.data.pictures import SUFFIXES, Picture
from diffgraft.errors import DiffgraftError, nearest

_COUNTED = re.compile(r"(\d+)_(.+)")
"""kohya's folders: how often the pictures come in a round, and what they show"""
_TABLES = ("metadata.jsonl", "metadata.csv")
"""As the image folders of `datasets` have them: a column `file_name`, and the captions"""
_CAPTIONS = ("text", "caption", "captions", "prompt")
"""What columns of captions are usually called"""
_MASKS = ("_mask.png", "-masklabel.png")
"""How names of masks end; the second is OneTrainer's"""


@dataclass(frozen=True)
class Counted:
    """One of kohya's folders, `10_sks dog`."""

    folder: Path
    repeats: int
    says: str
    """The prompt of pictures in it that have no caption"""


def counted_folders(folder: str | Path) -> list[Counted]:
    """The folders of kohya's layout in `folder`, or in its `img`; none where it is not laid out so."""
    folder = Path(folder).expanduser()
    for root in (folder, folder / "img"):
        inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        named = [(path, found) for path in inside if (found := _COUNTED.fullmatch(path.name))]
        if named:
            return [Counted(path, int(found[1]), found[2].strip()) for path, found in named if int(found[1])]
    return []


def read_source(where: str | Path, caption_column: str = "", *, thorough: bool = True) -> list[Picture]:
    """The pictures of a folder, of a data set that `datasets` has saved to a folder, or of one on the hub.

    If not `thorough`, only the beginnings of their files are looked at, and a damaged one may be among them.

    Raises:
        DiffgraftError: there is no such thing, or no readable picture in it.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        if (folder / "state.json").is_file():
            return _from_data_set(folder, caption_column, thorough)
        return read_folder(folder, caption_column, thorough=thorough)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)) and not folder.exists():
        return _from_data_set(str(where), caption_column, thorough)
    return read_folder(folder)


def read_folder(folder: str | Path, caption_column: str = "", *, thorough: bool = True) -> list[Picture]:
    """All JPEG, PNG and WebP pictures of `folder`, in the order of their names.

    Each has the caption of the ``.txt`` beside it, or those of its row in ``metadata.jsonl`` or ``metadata.csv``, and
    for a mask ``NAME_mask.png``. Pictures are turned upright (EXIF), transparency is laid on white, and grey, CMYK and
    palette pictures become RGB. A file that cannot be read is named in a warning and left out.

    Raises:
        DiffgraftError: there is no such folder, or no readable picture in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DiffgraftError(f"The picture folder {folder} {what}. Give a folder of JPEG, PNG or WebP pictures.")
    told = _table(folder, caption_column)
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    paths = sorted(path for path in files if not _is_mask(path))
    paths += [folder / name for name in sorted(told) if "/" in name and (folder / name).is_file()]
    if missing := sorted(name for name in told if not (folder / name).is_file()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(f"The table in {folder} names {missing[0]}{more}, and there is no such file.", stacklevel=3)
    found = [_picture(folder, path, told) for path in paths]
    pictures = _readable(found, thorough)
    if not pictures:
        what = f"none of its {len(paths)} picture files can be read" if paths else "it holds no picture files"
        raise DiffgraftError(f"No picture was found in {folder}: {what}. Put JPEG, PNG or WebP pictures there.")
    return pictures


def _readable(pictures: Sequence[Picture], thorough: bool) -> list[Picture]:
    kept = []
    for picture in tqdm(pictures, "looking at pictures", leave=False, disable=len(pictures) < 100):
        try:
            _ = picture.image if thorough else picture.size
        except Exception as error:  # what the decoders stumble over in a damaged file is of many kinds
            warn_of(picture, error)
            continue
        kept.append(picture)
    return kept


def warn_of(picture: Picture, error: Exception) -> None:
    """Say that a picture is left out."""
    warnings.warn(f"{picture.name} is left out: {unreadable(error)}.", stacklevel=4)


def unreadable(error: Exception) -> str:
    """Why a picture cannot be opened, without the names that Pillow has for what it was given."""
    return f"it cannot be read as a picture ({re.sub(r' <_io[.]BytesIO[^>]*>', '', str(error))})"


def _picture(folder: Path, path: Path, told: dict[str, tuple[str, ...]]) -> Picture:
    name = path.relative_to(folder).as_posix()
    beside = _beside(path.with_suffix(".txt"))
    masks = (path.with_name(path.stem + ending) for ending in _MASKS)
    captions = (beside,) if beside else told.get(name, ())
    return Picture(name, path.read_bytes, captions, next((mask for mask in masks if mask.is_file()), None))


def _is_mask(path: Path) -> bool:
    """Whether it is the mask of a picture that lies beside it."""
    return any(
        path.name.endswith(ending) and path.with_name(path.name.removesuffix(ending) + suffix).is_file()
        for ending in _MASKS
        for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES))
    )


def _beside(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DiffgraftError(
            f"The caption {path} is not written in UTF-8 ({error.reason}). Save it as UTF-8."
        ) from error


def _table(folder: Path, caption_column: str) -> dict[str, tuple[str, ...]]:
    """File name → captions, of the folder's metadata; empty where it has none."""
    for name in _TABLES:
        if (path := folder / name).is_file():
            rows = _rows(path)
            columns = list(rows.column_names)
            if "file_name" not in columns:
                raise DiffgraftError(f"{path} has the columns {', '.join(columns)}, and needs one called file_name.")
            column = _caption_column(columns, caption_column, str(path))
            return {str(row["file_name"]): _as_captions(row[column]) for row in rows} if column else {}
    return {}


def _rows(path: Path) -> Any:
    """A table file as a `datasets.Dataset`, nothing of it left in the library's cache."""
    import tempfile

    from datasets import Dataset
    from datasets.utils import disable_progress_bars, enable_progress_bars

    read = Dataset.from_csv if path.suffix == ".csv" else Dataset.from_json
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            return read(str(path), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # its readers raise whatever their parsing stumbles over
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise DiffgraftError(f"{path} cannot be read as a table: {cause}.") from error
    finally:
        enable_progress_bars()


def _caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    if wanted and wanted not in columns:
        raise DiffgraftError(f"{where} has no column {wanted!r}: {nearest(wanted, columns)}")
    return wanted or next((name for name in _CAPTIONS if name in columns), "")


def _as_captions(value: Any) -> tuple[str, ...]:
    """A cell, which may hold one caption or a list of them."""
    listed = value if isinstance(value, list) else [value]
    return tuple(text for one in listed if one is not None and (text := str(one).strip()))


def _from_data_set(where: str | Path, caption_column: str, thorough: bool) -> list[Picture]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets import Image as ImageFeature

    try:
        found = load_from_disk(str(where)) if isinstance(where, Path) else load_dataset(where)
    except Exception as error:  # the hub's client and the library raise what they will
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DiffgraftError(
            f"The data set {where} cannot be read: no folder of that name exists here, and `datasets` said: {lines[0]}"
        ) from error
    if isinstance(found, DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    assert isinstance(found, Dataset)
    images = [name for name, feature in found.features.items() if isinstance(feature, ImageFeature)]
    if not images:
        raise DiffgraftError(f"The data set {where} has no column of images, but: {', '.join(found.column_names)}.")
    column = _caption_column(found.column_names, caption_column, f"The data set {where}")
    rows = found.cast_column(images[0], ImageFeature(decode=False))

    def reader(number: int) -> Any:
        def read() -> bytes:
            cell = rows[number][images[0]]
            content: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return content

        return read

    captions = [_as_captions(value) for value in found[column]] if column else [()] * len(found)
    pictures = _readable([Picture(f"row {n}", reader(n), captions[n]) for n in range(len(found))], thorough)
    if not pictures:
        raise DiffgraftError(f"No picture was found in the data set {where}.")
    return pictures
