"""Where pictures come from: a folder, with captions in the ways people keep them, or a data set of `datasets`."""

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from diffgraft.data.data_sets import from_data_set
from diffgraft.data.inventory import CAPTIONS, TABLES, named, take_inventory
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
    """The pictures of a folder, of a data set that `datasets` has saved to a folder, or of one on the hub.

    If not `thorough`, only the beginnings of their files are looked at, and a damaged one may be among them.

    Raises:
        DiffgraftError: there is no such thing, or no readable picture in it.
    """
    folder = Path(where).expanduser()
    is_data_set = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    if not is_data_set and not _is_id(str(where), folder):
        return read_folder(folder, caption_column, thorough=thorough, outside=outside, used=used)
    pictures = _readable(from_data_set(folder if is_data_set else str(where), caption_column), thorough)
    if not pictures:
        raise DiffgraftError(f"No picture was found in the data set {where}.")
    return pictures


def _is_id(where: str, folder: Path) -> bool:
    """Whether it is meant as a name on the hub: `owner/name`, with no folder here that is called as the owner."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where)) and not folder.exists() and not folder.parent.exists()


def read_folder(
    folder: str | Path,
    caption_column: str = "",
    *,
    thorough: bool = True,
    outside: bool = False,
    used: Collection[Path] = (),
) -> list[Picture]:
    """All pictures of `folder`, in the order of their names, and those below it that its table names.

    Each has the caption of the ``.txt`` or ``.caption`` beside it, or those of its rows in ``metadata.jsonl`` or
    ``metadata.csv``, and for a mask ``NAME_mask.png``. Pictures are turned upright (EXIF), transparency is laid on
    white, and grey, CMYK and palette pictures become RGB. What lies in the folder and is not used, or cannot be read,
    is named in warnings.

    Args:
        folder: where they lie.
        caption_column: the table's column with the captions.
        thorough: whether every picture is decoded once, so that a damaged one is noticed.
        outside: whether the table and links may lead out of the folder.
        used: folders whose pictures are used otherwise, so that nothing is said of them.

    Raises:
        DiffgraftError: there is no such folder, or no readable picture in it, or a picture lies outside of it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DiffgraftError(f"The picture folder {folder} {what}. Give a folder of JPEG, PNG or WebP pictures.")
    told = read_table(folder, caption_column, outside=outside)
    further = [path for path in told if path.parent != folder]
    if not outside:
        _refuse_links(folder)
    content = take_inventory(folder, further, used)
    paths = [*content.pictures, *sorted(further)]
    found = [
        Picture(
            path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
            path.read_bytes,
            (content.captions[path],) if path in content.captions else told.get(path, ()),
            content.masks.get(path),
            path,
        )
        for path in paths
    ]
    if not found:
        more = "".join(f" {said}" for said in content.remarks)
        raise DiffgraftError(
            f"No picture was found in {folder}: it holds no picture files. Put JPEG, PNG or WebP pictures there.{more}"
        )
    twice = [path for path, said in content.captions.items() if told.get(path) and (said,) != told[path]]
    if twice:
        warnings.warn(
            f"{named(twice)} {'has' if len(twice) == 1 else 'have'} a caption in a file and another in the table: "
            "the file's is used.",
            stacklevel=3,
        )
    for said in content.remarks:
        warnings.warn(said, stacklevel=3)
    pictures = _readable(found, thorough)
    if not pictures:
        raise DiffgraftError(
            f"No picture was found in {folder}: none of its {len(found)} picture files can be read. Put JPEG, PNG or "
            "WebP pictures there."
        )
    if moving := [picture.name for picture in pictures if picture.moves]:
        warnings.warn(f"Of files with several pictures the first is learnt: {named(moving)}.", stacklevel=3)
    return pictures


def _refuse_links(folder: Path) -> None:
    """Raises DiffgraftError where a picture, a mask, a caption or a table of a folder is a link out of it."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and (path.suffix.lower() in (*SUFFIXES, *CAPTIONS) or path.name in TABLES):
            check_inside(folder, path, str(path))


def _readable(pictures: Sequence[Picture], thorough: bool) -> list[Picture]:
    kept = []
    for picture in track(pictures, "looking at pictures", min_items=100):
        try:
            _ = picture.image if thorough else picture.size
        except UnreadablePictureError as error:
            warn_left_out(error)
            continue
        kept.append(picture)
    return kept


def warn_left_out(error: UnreadablePictureError) -> None:
    """Say that a picture is left out."""
    warnings.warn(f"{error.name} is left out: it cannot be read as a picture ({error.why}).", stacklevel=4)
