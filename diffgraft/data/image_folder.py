"""Pictures with captions and masks from a folder, or from a data set of the library `datasets`."""

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from diffgraft.data.data_sets import from_data_set
from diffgraft.data.inventory import CAPTIONS, TABLES, list_names, take_inventory
from diffgraft.data.pictures import SUFFIXES, Picture, UnreadablePictureError
from diffgraft.data.tables import check_inside, read_table
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track


def read_source(
    where: str | Path,
    caption_column: str = "",
    *,
    thorough: bool = True,
    outside: bool = False,
    used: Collection[Path] = (),
) -> list[Picture]:
    """Return the pictures of a folder, of a data set that `datasets` saved to a folder, or of one on the hub.

    Args:
        where: path of a folder, or id of a data set on the hub.
        caption_column: column with the captions, of the folder's table or of the data set; empty: a usual name.
        thorough: whether to decode every picture once, so that damaged ones are found.
        outside: whether the folder's table and links may lead out of the folder.
        used: folders whose pictures are used otherwise, so that no warnings are given about them.

    Raises:
        DiffgraftError: the folder or data set does not exist, or has no readable picture.
    """
    folder = Path(where).expanduser()
    is_data_set = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if not is_data_set and not _is_id(str(where), folder):
        return read_folder(folder, caption_column, thorough=thorough, outside=outside, used=used)
    pictures = _readable(from_data_set(folder if is_data_set else str(where), caption_column), thorough)
    if not pictures:
        raise DiffgraftError(f"The data set {where} has no readable picture.")
    return pictures


def _is_id(where: str, folder: Path) -> bool:
    """Whether `where` is an id on the hub, `owner/name`: neither the folder nor its parent exists here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where)) and not folder.exists() and not folder.parent.exists()


def read_folder(
    folder: str | Path,
    caption_column: str = "",
    *,
    thorough: bool = True,
    outside: bool = False,
    used: Collection[Path] = (),
) -> list[Picture]:
    """Return all pictures of `folder`, ordered by name, and those below it that its table names.

    Captions are read from the ``.txt`` or ``.caption`` file beside a picture, or from its rows in ``metadata.jsonl`` or
    ``metadata.csv``; masks from ``NAME_mask.png``. Pictures are rotated upright (EXIF), transparency is laid on white,
    and grey, CMYK and palette pictures become RGB. Warnings name files that are not used or cannot be read.

    Args:
        folder: path of the folder.
        caption_column: column of the table with the captions; empty: a usual name.
        thorough: whether to decode every picture once, so that damaged ones are found.
        outside: whether the table and links may lead out of the folder.
        used: folders whose pictures are used otherwise, so that no warnings are given about them.

    Raises:
        DiffgraftError: the folder does not exist or has no readable picture, or a picture is outside of it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DiffgraftError(f"The picture folder {folder} {problem}. Give a folder of JPEG, PNG or WebP pictures.")
    table = read_table(folder, caption_column, outside=outside)
    elsewhere = [path for path in table if path.parent != folder]
    if not outside:
        _refuse_links(folder)
    content = take_inventory(folder, elsewhere, used)
    paths = [*content.pictures, *sorted(elsewhere)]
    candidates = [
        Picture(
            path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
            path.read_bytes,
            (content.captions[path],) if path in content.captions else table.get(path, ()),
            content.masks.get(path),
            path,
        )
        for path in paths
    ]
    if not candidates:
        more = "".join(f" {remark}" for remark in content.remarks)
        raise DiffgraftError(f"The folder {folder} has no picture files. Put JPEG, PNG or WebP pictures there.{more}")
    twice = [path for path, caption in content.captions.items() if table.get(path) and (caption,) != table[path]]
    if twice:
        warnings.warn(
            f"{list_names(twice)} {'has' if len(twice) == 1 else 'have'} a caption in a file and another in the table: "
            "the file's is used.",
            stacklevel=3,
        )
    for remark in content.remarks:
        warnings.warn(remark, stacklevel=3)
    pictures = _readable(candidates, thorough)
    if not pictures:
        raise DiffgraftError(
            f"None of the {len(candidates)} picture files in {folder} can be read. Save them again as JPEG or PNG."
        )
    if animated := [picture.name for picture in pictures if picture.is_animated]:
        warnings.warn(f"Only the first frame of files with several is used: {list_names(animated)}.", stacklevel=3)
    return pictures


def _refuse_links(folder: Path) -> None:
    """Raise DiffgraftError if a picture, mask, caption or table of a folder is a link to a file outside of it."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and (path.suffix.lower() in (*SUFFIXES, *CAPTIONS) or path.name in TABLES):
            check_inside(folder, path, str(path))


def _readable(pictures: Sequence[Picture], thorough: bool) -> list[Picture]:
    """Return the pictures that can be read, and warn about the others; if `thorough`, they are decoded entirely."""
    readable = []
    for picture in track(pictures, "looking at pictures", min_items=100):
        try:
            _ = picture.image if thorough else picture.size
        except UnreadablePictureError as error:
            warn_left_out(error)
            continue
        readable.append(picture)
    return readable


def warn_left_out(error: UnreadablePictureError) -> None:
    """Warn that a picture is left out because it cannot be read."""
    warnings.warn(f"{error.name} is left out: it cannot be read as a picture ({error.why}).", stacklevel=4)
