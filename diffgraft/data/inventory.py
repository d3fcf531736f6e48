"""Inventory of a folder of pictures: which files training uses, and remarks on those that it does not use."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffgraft.data.pictures import SUFFIXES
from diffgraft.data.settings import FolderLayout
from diffgraft.errors import DiffgraftError

NUMBERED = re.compile(r"(\d+)_(.+)")
"""Names of kohya's folders: repeats of their pictures in an epoch, and their prompt"""
_UNREADABLE = (
    *(".heic", ".heif", ".hif", ".avifs", ".bpg", ".jxs", ".pcx", ".icns", ".cur", ".wmf", ".emf", ".3fr"),
    *(".jxl", ".jxr", ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".ai", ".pdf", ".tga", ".dds"),
    *(".ico", ".exr", ".hdr", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
)
"""Suffixes of pictures and videos that are not supported"""
_MASKS = ("_mask", "-masklabel")
"""Endings of the stems of masks; the second is OneTrainer's"""
_CONDITIONS = ("-condlabel",)
"""Endings of the stems of OneTrainer's conditioning pictures, which are not used"""
CAPTIONS = (".txt", ".caption")
"""Suffixes of captions in the order of preference; the second is that of sd-scripts"""
_TABLE_KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".toml", ".yaml", ".yml", ".xml", ".xmp")
"""Suffixes of other files that may hold captions; the first five are tables"""
_LIKE_MASK = re.compile(r"(.+?)[ ._-]?(mask|masks|alpha|matte)", re.IGNORECASE)
"""Stems of masks as other programs name them: the picture's stem and a word"""
_SNIFFED = 1000
"""Number of files with unknown suffixes whose first bytes are checked at most"""
TABLES = ("metadata.jsonl", "metadata.csv")
"""Names of tables as in image folders of the library `datasets`: a column `file_name`, and columns of captions"""
_MANY_REPEATS = 1000
"""Repeats of a folder from which a remark is given"""
_MAX_REPEATS = 100_000
"""Repeats of a folder at most, as for the setting `repeats`"""
_MAX_CAPTION = 2**18
"""Bytes of a caption at most; a text encoder reads some hundred of them"""
_NAMED = 3
"""Number of files that a remark names at most"""
_MAX_ENTRIES = 100_000
"""Number of files below a folder that are listed at most, in case a whole disk is given"""


@dataclass(frozen=True)
class KohyaFolder:
    """A numbered folder in kohya's layout, such as `10_sks dog`."""

    folder: Path
    """Path of the folder"""
    repeats: int
    """Repeats of its pictures in an epoch"""
    prompt: str
    """Prompt of its pictures without a caption"""


@dataclass(frozen=True)
class Layout:
    """The layout of a folder: its numbered subfolders; none if the pictures are in the folder itself."""

    folders: Sequence[KohyaFolder]
    remarks: Sequence[str]
    """Sentences about pictures that are not used"""


def detect_layout(
    folder: str | Path, layout: FolderLayout = "auto", used: Collection[Path] = (), *, has_setting: bool = True
) -> Layout:
    """Detect whether `folder` is flat, or has numbered subfolders in kohya's layout (in itself or in its `img`).

    Args:
        folder: path of the folder.
        layout: the setting `layout`; ``auto`` detects the layout.
        used: subfolders whose pictures are used otherwise, so that there are no remarks on them.
        has_setting: whether the user can set the layout, so that messages suggest it; not so for class images.

    Raises:
        DiffgraftError: with ``auto``, both layouts are possible; with ``kohya``, there are no numbered folders.
    """
    folder = Path(folder).expanduser()
    for root in (folder, folder / "img") if layout != "flat" else ():
        matches = [(path, match) for path in _folders(root) if (match := NUMBERED.fullmatch(path.name))]
        numbered = [KohyaFolder(path, int(match[1]), match[2].strip()) for path, match in matches if int(match[1])]
        counts = {item.folder: len(pictures_in(item.folder)) for item in numbered}
        if not any(counts.values()):
            continue
        roots = dict.fromkeys((folder, root))
        loose = [path for place in roots for path in pictures_in(place)]
        tables = [place / name for place in roots for name in TABLES if (place / name).is_file()]
        if (loose or tables) and layout == "auto":
            listed = ", ".join(f"{item.folder.name} ({counts[item.folder]} x {item.repeats})" for item in numbered)
            advice = "ove the pictures that are not meant to another place."
            advice = f"Set layout=flat or layout=kohya, or m{advice}" if has_setting else f"M{advice}"
            flat = f"the {pluralize(len(loose), 'picture')} in it ({list_names(loose)})" if loose else ""
            flat += " and " if loose and tables else ""
            flat += f"the pictures that {tables[0].name} names" if tables else ""
            raise DiffgraftError(
                f"{folder} can be read in two ways: as {flat}, or in "
                f"kohya's layout as the pictures of its numbered folders: {listed}. {advice}"
            )
        _check_repeats(numbered)
        unread = [f"{path} is not read, as layout=kohya only reads tables in numbered folders." for path in tables]
        return Layout(numbered, [*_outside_of(folder, numbered, used), *unread, *_many_repeats(numbered)])
    if layout == "kohya":
        raise DiffgraftError(
            f"layout=kohya is set, but {folder} has no numbered folder with pictures: name folders like 10_sks dog."
        )
    return Layout([], [])


def kohya_folders(folder: str | Path, layout: FolderLayout = "auto") -> list[KohyaFolder]:
    """Return the numbered folders in `folder`, or in its `img`; an empty list if it is flat."""
    return list(detect_layout(folder, layout).folders)


def _check_repeats(numbered: Sequence[KohyaFolder]) -> None:
    for item in numbered:
        if item.repeats > _MAX_REPEATS:
            raise DiffgraftError(
                f"The name of the folder {item.folder} means, in kohya's layout, {item.repeats:,} repeats of each "
                f"picture, but at most {_MAX_REPEATS:,} are allowed. Rename it, or set layout=flat."
            )


def _many_repeats(numbered: Sequence[KohyaFolder]) -> Iterator[str]:
    for item in numbered:
        if item.repeats >= _MANY_REPEATS:
            yield (
                f"The name of the folder {item.folder.name} means, in kohya's layout, {item.repeats:,} repeats of each "
                "picture. If its number is a year or the like, rename it, or set layout=flat."
            )


def _outside_of(folder: Path, numbered: Sequence[KohyaFolder], used: Collection[Path]) -> Iterator[str]:
    """Yield a remark on pictures beside the numbered folders."""
    roots = {item.folder for item in numbered}
    places: Counter[str] = Counter()
    for path in _below(folder, used):
        if not any(parent in roots for parent in path.parents):
            places[_first_level(path, folder)] += 1
    if places:
        yield (
            f"{pluralize(places.total(), 'picture')} in {folder} {_are(places.total())} not used, as only those "
            f"in numbered folders are: {_listed(places)}."
        )


@dataclass(frozen=True)
class Inventory:
    """The files of one folder, sorted by their use."""

    pictures: Sequence[Path]
    """Pictures to train on, ordered by name"""
    captions: dict[Path, str]
    """Picture → content of the caption file beside it, with its lines"""
    masks: dict[Path, Path]
    """Picture → its mask"""
    remarks: Sequence[str]
    """Sentences about files that are not used"""


def take_inventory(folder: Path, in_table: Collection[Path] = (), used: Collection[Path] = ()) -> Inventory:
    """Sort the files of a folder by their use.

    Captions and masks belong to the picture of the same name, such as `a.txt` or `a.jpg.txt` and `a_mask.png` or
    `a-masklabel.png`; the case of the suffix and the Unicode form of the name do not matter.

    Args:
        folder: path of the folder.
        in_table: pictures outside of the folder itself that its table names.
        used: folders whose pictures are used otherwise, so that there are no remarks on them.

    Raises:
        DiffgraftError: a caption is too long or not written in UTF-8.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("._"))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    mask_files = [path for path in images if is_mask_or_condition(path)]
    pictures = [path for path in images if path not in set(mask_files)]
    all_pictures = list(dict.fromkeys([*pictures, *in_table]))
    masks, mask_remarks = _match_masks(folder, all_pictures, mask_files)
    captions, caption_remarks = _match_captions(all_pictures, files)
    remarks = [
        *_unsupported_formats(files, folder),
        *_without_suffix(files),
        *_broken_links(folder),
        *mask_remarks,
        *_named_like_masks(pictures),
        *caption_remarks,
        *_unread_captions(all_pictures, files, folder),
        *_in_subfolders(folder, {path.resolve() for path in in_table}, used),
    ]
    return Inventory(pictures, captions, masks, remarks)


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files in a folder itself without masks, sorted; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    images = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in images if not is_mask_or_condition(path) and not path.name.startswith("._"))


def list_names(paths: Sequence[Path] | Sequence[str]) -> str:
    """List the first three names of files, and the number of further ones."""
    names = [path.name if isinstance(path, Path) else path for path in paths]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def is_mask_or_condition(path: Path) -> bool:
    """Whether the name of a file is that of a mask or of a conditioning picture."""
    return path.stem.lower().endswith((*_MASKS, *_CONDITIONS))


class _ByName:
    """Files by name, whatever the case and the Unicode form; exact matches come first."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._exact: dict[tuple[Path, str], Path] = {}
        self._folded: dict[tuple[Path, str], Path] = {}
        for path in files:
            self._exact.setdefault((path.parent, _normalized(path.name, path.suffix)), path)
            self._folded.setdefault((path.parent, _normalized(path.name, path.suffix).casefold()), path)

    def find(self, folder: Path, name: str) -> Path | None:
        """Return the file of that name, or None."""
        key = unicodedata.normalize("NFC", name)
        return self._exact.get((folder, key)) or self._folded.get((folder, key.casefold()))


def _normalized(name: str, suffix: str) -> str:
    """Return a name in Unicode's composed form, with its suffix in lower case."""
    return unicodedata.normalize("NFC", name.removesuffix(suffix) + suffix.lower())


def _match_masks(
    folder: Path, pictures: Sequence[Path], mask_files: Sequence[Path]
) -> tuple[dict[Path, Path], list[str]]:
    """Return picture → mask, and remarks on masks that are not used."""
    elsewhere = sorted({path.parent for path in pictures} - {folder})
    more = [path for place in elsewhere for path in place.iterdir() if path.suffix.lower() in SUFFIXES]
    candidates = [*mask_files, *(path for path in more if is_mask_or_condition(path))]
    if not candidates:
        return {}, []
    of_stem: dict[tuple[Path, str], list[Path]] = {}
    for path in pictures:
        for stem in dict.fromkeys((path.stem, path.name)):
            of_stem.setdefault((path.parent, _fold(stem)), []).append(path)
    masks: dict[Path, Path] = {}
    orphans, second, conditions = [], [], []
    for path in sorted(candidates, key=lambda mask: (not mask.stem.lower().endswith(_MASKS[0]), mask)):
        masked = of_stem.get((path.parent, _stem_of_picture(path)), [])
        if path.stem.lower().endswith(_CONDITIONS):
            conditions.append(path)
        elif not masked:
            orphans.append(path)
        elif all(picture in masks for picture in masked):
            second.append(path)
        else:
            masks |= {picture: path for picture in masked if picture not in masks}
    orphans = [path for path in orphans if path.parent == folder]
    remarks = []
    if orphans:
        remarks.append(
            f"{pluralize(len(orphans), 'mask')} {_belong(len(orphans))} to no picture and {_are(len(orphans))} not "
            f"used: {list_names(orphans)}. If {_it(len(orphans))} a picture to train on, rename it."
        )
    if second:
        remarks.append(f"Only one mask of a picture is used; not used: {list_names(second)}.")
    if conditions:
        remarks.append(f"Conditioning pictures are not used: {list_names(conditions)}.")
    return masks, remarks


def _stem_of_picture(mask: Path) -> str:
    """Return the folded stem of the picture that a mask belongs to by its name."""
    ending = next(ending for ending in (*_MASKS, *_CONDITIONS) if mask.stem.lower().endswith(ending))
    return _fold(mask.stem[: -len(ending)])


def _fold(stem: str) -> str:
    """Return a stem for comparisons, without differences of case and Unicode form."""
    return unicodedata.normalize("NFC", stem).casefold()


def _match_captions(pictures: Sequence[Path], files: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Return picture → caption, and remarks on caption files that are empty or not used."""
    beside = [path for path in files if path.suffix.lower() in CAPTIONS]
    elsewhere = sorted({path.parent for path in pictures} - {path.parent for path in files})
    more = [path for folder in elsewhere for path in folder.iterdir() if path.suffix.lower() in CAPTIONS]
    caption_files = _ByName([*beside, *more])
    captions: dict[Path, str] = {}
    seen: set[Path] = set()
    empty: list[Path] = []
    others: list[Path] = []
    for picture in pictures:
        names = [f"{stem}{suffix}" for stem in (picture.stem, picture.name) for suffix in CAPTIONS]
        own = [path for name in names if (path := caption_files.find(picture.parent, name)) is not None]
        texts = {path: text for path in own if (text := _read(path))}
        seen.update(own)
        if texts:
            captions[picture] = next(iter(texts.values()))
            others += [path for path, text in texts.items() if text != captions[picture]]
        elif own:
            empty.append(own[0])
    remarks = []
    if empty:
        remarks.append(
            f"{pluralize(len(empty), 'caption')} {_are(len(empty))} empty ({list_names(empty)}): their pictures are "
            "used as if they had none."
        )
    if others:
        remarks.append(
            f"Only the first of two different captions of a picture is used; not used: {list_names(others)}."
        )
    if unmatched := [path for path in beside if path not in seen]:
        count = len(unmatched)
        remarks.append(f"{pluralize(count, 'text file')} {_belong(count)} to no picture: {list_names(unmatched)}.")
    return captions, remarks


def _read(path: Path) -> str:
    """Return the caption in a file."""
    if (size := path.stat().st_size) > _MAX_CAPTION:
        raise DiffgraftError(f"The caption {path} has {size:,} bytes, but at most {_MAX_CAPTION:,} are allowed.")
    try:
        text = path.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DiffgraftError(
            f"The caption {path} is not written in UTF-8 ({error.reason}). Save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 of plain English is valid UTF-8 with a zero behind each letter
        raise DiffgraftError(
            f"The caption {path} is not UTF-8, as it contains NUL bytes (perhaps UTF-16). Save it as UTF-8."
        )
    return text


def _unsupported_formats(files: Sequence[Path], folder: Path) -> Iterator[str]:
    if found := [path for path in files if path.suffix.lower() in _UNREADABLE]:
        yield (
            f"{pluralize(len(found), 'file')} in {folder} {_are(len(found))} of an unsupported format and not used: "
            f"{list_names(found)}. Save such pictures as JPEG or PNG."
        )


def _without_suffix(files: Sequence[Path]) -> Iterator[str]:
    """Yield a remark on files that have the content of pictures, but not their suffixes."""
    known = (*SUFFIXES, *_UNREADABLE, *CAPTIONS, *_TABLE_KINDS)
    unknown = [path for path in files if path.suffix.lower() not in known and not path.name.startswith(".")]
    if found := [path for path in unknown[:_SNIFFED] if _begins_as_picture(path)]:
        yield (
            f"{list_names(found)} {'holds' if len(found) == 1 else 'hold'} a picture, but {_are(len(found))} not used: "
            "the name has no suffix of pictures (.jpg, .png, …). Rename it."
        )


def _begins_as_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _broken_links(folder: Path) -> Iterator[str]:
    links = (path for path in sorted(folder.iterdir()) if path.is_symlink() and path.suffix.lower() in SUFFIXES)
    if found := [path for path in links if not path.exists()]:
        yield f"{pluralize(len(found), 'link')} in {folder} {_are(len(found))} broken: {list_names(found)}."


def _named_like_masks(pictures: Sequence[Path]) -> Iterator[str]:
    """Yield a remark on pictures that are named like masks of other programs."""
    stems = {(path.parent, _fold(path.stem)) for path in pictures}
    found = [
        path
        for path in pictures
        if (match := _LIKE_MASK.fullmatch(path.stem)) and (path.parent, _fold(match[1])) in stems
    ]
    if found:
        yield f"{list_names(found)} {_are(len(found))} used as pictures: if they are masks, name them NAME_mask.png."


def _unread_captions(pictures: Sequence[Path], files: Sequence[Path], folder: Path) -> Iterator[str]:
    """Yield remarks on files that may hold captions, but are not read."""
    stems = {_fold(stem) for path in pictures for stem in (path.stem, path.name)}
    tables = [name for name in TABLES if any(path.name == name for path in files)]
    beside = [
        path
        for path in files
        if path.suffix.lower() in (*_TABLE_KINDS, ".tags", ".cap", ".text") and _fold(path.stem) in stems
    ]
    if beside:
        yield (f"Captions are not read from {list_names(beside)}: a caption file ends in .txt or .caption.")
    other_tables = [path for path in files if path.suffix.lower() in _TABLE_KINDS[:5] and path not in beside]
    other_tables = [path for path in other_tables if path.name not in tables]
    if other_tables:
        yield (
            f"{list_names(other_tables)} in {folder} is not read: a table of captions is called {' or '.join(TABLES)}"
            + (f", and {tables[0]} is read here." if tables else ".")
        )


def _in_subfolders(folder: Path, in_table: Collection[Path], used: Collection[Path]) -> Iterator[str]:
    places: Counter[str] = Counter()
    for path in _below(folder, used):
        if path.parent != folder and not (in_table and path.resolve() in in_table):
            places[_first_level(path, folder)] += 1
    if places:
        yield (
            f"{pluralize(places.total(), 'picture')} in subfolders of {folder} {_are(places.total())} not used: "
            f"{_listed(places)}. Move them up, name the folders as kohya does (10_sks dog), or give each as a concept."
        )


def _below(folder: Path, used: Collection[Path]) -> Iterator[Path]:
    """Yield picture files in a folder and below it, without masks, hidden folders and the folders `used`."""
    resolved = {path.expanduser().resolve() for path in used}
    seen = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(place, name).resolve() not in resolved
        )
        for name in sorted(names):
            path = Path(place, name)
            if (
                path.suffix.lower() in (*SUFFIXES, *_UNREADABLE)
                and not name.startswith("._")
                and not is_mask_or_condition(path)
            ):
                yield path
        if (seen := seen + len(names)) > _MAX_ENTRIES:
            return


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _first_level(path: Path, folder: Path) -> str:
    first, *rest = path.relative_to(folder).parts
    return f"{first}/" if rest else "the folder itself"


def _listed(places: Counter[str]) -> str:
    return ", ".join(f"{count} in {place}" for place, count in places.items())


def pluralize(number: int, noun: str) -> str:
    """Return a number with a noun in singular or plural: "1 picture", "1,200 pictures"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _belong(number: int) -> str:
    return "belongs" if number == 1 else "belong"


def _it(number: int) -> str:
    return "it is" if number == 1 else "one of them is"
