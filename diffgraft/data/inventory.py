"""What a folder of pictures holds: what will be learnt from, what lies there and will not be, and why."""

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
"""kohya's folders: how often the pictures come in a round, and what they show"""
_UNREADABLE = (
    *(".heic", ".heif", ".hif", ".avifs", ".bpg", ".jxs", ".pcx", ".icns", ".cur", ".wmf", ".emf", ".3fr"),
    *(".jxl", ".jxr", ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".ai", ".pdf", ".tga", ".dds"),
    *(".ico", ".exr", ".hdr", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi"),
)
"""Pictures and films that people keep among the others, and that are not read here"""
_MASKS = ("_mask", "-masklabel")
"""How the stems of masks end; the second is OneTrainer's"""
_CONDITIONS = ("-condlabel",)
"""How the stems of OneTrainer's conditioning pictures end, which nothing here learns from"""
CAPTIONS = (".txt", ".caption")
"""Suffixes of captions, in the order in which they are looked for; the second is that of sd-scripts"""
_TABLE_KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".toml", ".yaml", ".yml", ".xml", ".xmp")
"""Suffixes of files that may hold captions; the first five of tables of them"""
_LIKE_MASK = re.compile(r"(.+?)[ ._-]?(mask|masks|alpha|matte)", re.IGNORECASE)
"""Names of masks as other programs have them, after that of the picture"""
_SNIFFED = 1000
"""Files with other suffixes whose beginnings are looked at, at most"""
TABLES = ("metadata.jsonl", "metadata.csv")
"""As the image folders of `datasets` have them: a column `file_name`, and the captions"""
_MANY_REPEATS = 1000
_MOST_REPEATS = 100_000
"""As the setting `repeats` has it"""
_LONGEST_CAPTION = 2**18
"""Bytes; a text encoder reads some hundred of them"""
_NAMED = 3
"""So many files are named where more of them have the same fault"""
_MOST_ENTRIES = 100_000
"""Files that are looked at below a folder, at most: somebody may give a whole disk"""


@dataclass(frozen=True)
class KohyaFolder:
    """One of kohya's folders, `10_sks dog`."""

    folder: Path
    repeats: int
    prompt: str
    """The prompt of pictures in it that have no caption"""


@dataclass(frozen=True)
class Layout:
    """The numbered folders that are learnt from; none where the pictures lie in the folder itself."""

    folders: Sequence[KohyaFolder]
    remarks: Sequence[str]
    """Sentences on pictures that will not be learnt from"""


def detect_layout(
    folder: str | Path, layout: FolderLayout = "auto", used: Collection[Path] = (), *, has_setting: bool = True
) -> Layout:
    """How `folder` is laid out: in kohya's way, here or in its `img`, or flat; of `used` folders nothing is said.

    Without `has_setting` no setting says how it is laid out, as for folders of class images.

    Raises:
        DiffgraftError: it can be read in both ways and `layout` does not say which is meant, or it has no numbered
            folders and should be read as if it had.
    """
    folder = Path(folder).expanduser()
    for root in (folder, folder / "img") if layout != "flat" else ():
        found = [(one, match) for one in _folders(root) if (match := NUMBERED.fullmatch(one.name))]
        counted = [KohyaFolder(one, int(match[1]), match[2].strip()) for one, match in found if int(match[1])]
        inside = {one.folder: len(pictures_in(one.folder)) for one in counted}
        if not any(inside.values()):
            continue
        places = dict.fromkeys((folder, root))
        own = [path for place in places for path in pictures_in(place)]
        tables = [place / name for place in places for name in TABLES if (place / name).is_file()]
        if (own or tables) and layout == "auto":
            numbered = ", ".join(f"{one.folder.name} ({inside[one.folder]} x {one.repeats})" for one in counted)
            advice = "ove what is not meant to another place."
            advice = f"Set layout=flat or layout=kohya, or m{advice}" if has_setting else f"M{advice}"
            flat = f"the {pluralize(len(own), 'picture')} in it ({named(own)})" if own else ""
            flat += " and " if own and tables else ""
            flat += f"the pictures that {tables[0].name} names" if tables else ""
            raise DiffgraftError(
                f"{folder} can be read in two ways: as {flat}, or in "
                f"kohya's layout as those of its numbered folders: {numbered}. {advice}"
            )
        _check_repeats(counted)
        unread = [f"{path} is not read, as layout=kohya takes the tables in numbered folders alone." for path in tables]
        return Layout(counted, [*_outside_of(folder, counted, used), *unread, *_often(counted)])
    if layout == "kohya":
        raise DiffgraftError(
            f"layout=kohya, and {folder} has no numbered folder with pictures in it: name them like 10_sks dog."
        )
    return Layout([], [])


def kohya_folders(folder: str | Path, layout: FolderLayout = "auto") -> list[KohyaFolder]:
    """The folders of kohya's layout in `folder`, or in its `img`; none where it is not laid out so."""
    return list(detect_layout(folder, layout).folders)


def _check_repeats(counted: Sequence[KohyaFolder]) -> None:
    for one in counted:
        if one.repeats > _MOST_REPEATS:
            raise DiffgraftError(
                f"The folder {one.folder} cannot be read in kohya's way: each picture in it would come "
                f"{one.repeats:,} times in a round, and the most is {_MOST_REPEATS:,}. Rename it, or set layout=flat."
            )


def _often(counted: Sequence[KohyaFolder]) -> Iterator[str]:
    for one in counted:
        if one.repeats >= _MANY_REPEATS:
            yield (
                f"The folder {one.folder.name} is read in kohya's way: each picture in it comes {one.repeats:,} times "
                "in a round. If its number is a year or the like, rename it, or set layout=flat."
            )


def _outside_of(folder: Path, counted: Sequence[KohyaFolder], used: Collection[Path]) -> Iterator[str]:
    """What lies beside numbered folders and is therefore not learnt from."""
    learnt = {one.folder for one in counted}
    places: Counter[str] = Counter()
    for path in _below(folder, used):
        if path.parent not in learnt and not any(one in learnt for one in path.parents):
            places[_first_level(path, folder)] += 1
    if places:
        yield (
            f"{pluralize(places.total(), 'picture')} in {folder} {_are(places.total())} not learnt from, as only those "
            f"in numbered folders are: {_listed(places)}."
        )


@dataclass(frozen=True)
class Inventory:
    """The files of one folder, sorted by what they are for."""

    pictures: Sequence[Path]
    """What is learnt from, in the order of their names"""
    captions: dict[Path, str]
    """Picture → what the file beside it says, its lines and all"""
    masks: dict[Path, Path]
    """Picture → its mask"""
    remarks: Sequence[str]
    """Sentences on what lies in the folder and is not used"""


def take_inventory(folder: Path, in_table: Collection[Path] = (), used: Collection[Path] = ()) -> Inventory:
    """Sort the files of a folder; `in_table` are pictures below it that a table names, `used` folders of other use.

    Captions and masks belong to the picture whose name they have, `a.txt` or `a.jpg.txt` and `a_mask.png` or
    `a-masklabel.png`, whatever the case of the suffix and the Unicode form of the name.

    Raises:
        DiffgraftError: a caption is not written in UTF-8.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("._"))
    shown = [path for path in files if path.suffix.lower() in SUFFIXES]
    aside = [path for path in shown if is_mask_or_condition(path)]
    pictures = [path for path in shown if path not in set(aside)]
    every = list(dict.fromkeys([*pictures, *in_table]))
    masks, of_masks = _masks(folder, every, aside)
    captions, of_captions = _captions(every, files)
    remarks = [
        *_of_formats(files, folder),
        *_without_suffix(files),
        *_of_broken_links(folder),
        *of_masks,
        *_like_masks(pictures),
        *of_captions,
        *_of_other_words(every, files, folder),
        *_in_subfolders(folder, {path.resolve() for path in in_table}, used),
    ]
    return Inventory(pictures, captions, masks, remarks)


def pictures_in(folder: Path) -> list[Path]:
    """The picture files that lie in a folder itself, masks left out; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not is_mask_or_condition(path) and not path.name.startswith("._"))


def named(paths: Sequence[Path] | Sequence[str]) -> str:
    """The first of some files' names, and how many more there are."""
    names = [path.name if isinstance(path, Path) else path for path in paths]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def is_mask_or_condition(path: Path) -> bool:
    """Whether it is by its name the mask, or the conditioning picture, of another."""
    return path.stem.lower().endswith((*_MASKS, *_CONDITIONS))


class _ByName:
    """Files by their stems, whatever the case and the Unicode form, those of the very same name first."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._exact: dict[tuple[Path, str], Path] = {}
        self._folded: dict[tuple[Path, str], Path] = {}
        for path in files:
            self._exact.setdefault((path.parent, _plain(path.name, path.suffix)), path)
            self._folded.setdefault((path.parent, _plain(path.name, path.suffix).casefold()), path)

    def find(self, folder: Path, name: str) -> Path | None:
        """The file of that name, if there is one."""
        key = unicodedata.normalize("NFC", name)
        return self._exact.get((folder, key)) or self._folded.get((folder, key.casefold()))


def _plain(name: str, suffix: str) -> str:
    """A name in its composed form, its suffix in small letters."""
    return unicodedata.normalize("NFC", name.removesuffix(suffix) + suffix.lower())


def _masks(folder: Path, pictures: Sequence[Path], aside: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    elsewhere = sorted({path.parent for path in pictures} - {folder})
    more = [path for place in elsewhere for path in place.iterdir() if path.suffix.lower() in SUFFIXES]
    every = [*aside, *(path for path in more if is_mask_or_condition(path))]
    if not every:
        return {}, []
    of_stem: dict[tuple[Path, str], list[Path]] = {}
    for path in pictures:
        for stem in dict.fromkeys((path.stem, path.name)):
            of_stem.setdefault((path.parent, _stem(stem)), []).append(path)
    found: dict[Path, Path] = {}
    orphans, second, conditions = [], [], []
    for path in sorted(every, key=lambda one: (not one.stem.lower().endswith(_MASKS[0]), one)):
        shown = of_stem.get((path.parent, _stem_of(path)), [])
        if path.stem.lower().endswith(_CONDITIONS):
            conditions.append(path)
        elif not shown:
            orphans.append(path)
        elif all(one in found for one in shown):
            second.append(path)
        else:
            found |= {one: path for one in shown if one not in found}
    orphans = [path for path in orphans if path.parent == folder]
    remarks = []
    if orphans:
        remarks.append(
            f"{pluralize(len(orphans), 'mask')} {_belong(len(orphans))} to no picture and {_are(len(orphans))} not "
            f"learnt from: {named(orphans)}. If {_it(len(orphans))} a picture to learn from, rename it."
        )
    if second:
        remarks.append(f"Each picture has one mask, and there are more of them: {named(second)} not used.")
    if conditions:
        remarks.append(f"Conditioning pictures are not learnt from: {named(conditions)}.")
    return found, remarks


def _stem_of(mask: Path) -> str:
    """The stem of the picture that a mask is of, by its name."""
    ending = next(one for one in (*_MASKS, *_CONDITIONS) if mask.stem.lower().endswith(one))
    return _stem(mask.stem[: -len(ending)])


def _stem(said: str) -> str:
    """A stem to be compared, whatever its case and Unicode form."""
    return unicodedata.normalize("NFC", said).casefold()


def _captions(pictures: Sequence[Path], files: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    beside = [path for path in files if path.suffix.lower() in CAPTIONS]
    elsewhere = sorted({path.parent for path in pictures} - {path.parent for path in files})
    more = [path for folder in elsewhere for path in folder.iterdir() if path.suffix.lower() in CAPTIONS]
    there = _ByName([*beside, *more])
    found: dict[Path, str] = {}
    seen: set[Path] = set()
    empty: list[Path] = []
    others: list[Path] = []
    for picture in pictures:
        names = [f"{stem}{suffix}" for stem in (picture.stem, picture.name) for suffix in CAPTIONS]
        own = [path for name in names if (path := there.find(picture.parent, name)) is not None]
        said = {path: text for path in own if (text := _read(path))}
        seen.update(own)
        if said:
            found[picture] = next(iter(said.values()))
            others += [path for path, text in said.items() if text != found[picture]]
        elif own:
            empty.append(own[0])
    remarks = []
    if empty:
        remarks.append(
            f"{pluralize(len(empty), 'caption')} {_are(len(empty))} empty ({named(empty)}): the pictures are learnt as "
            "if there were none."
        )
    if others:
        remarks.append(f"Of two captions beside a picture that differ only the first is used: {named(others)} not.")
    if left := [path for path in beside if path not in seen]:
        remarks.append(f"{pluralize(len(left), 'text file')} {_belong(len(left))} to no picture: {named(left)}.")
    return found, remarks


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > _LONGEST_CAPTION:
        raise DiffgraftError(f"The caption {path} has {size:,} bytes, and none has more than {_LONGEST_CAPTION:,}.")
    try:
        text = path.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DiffgraftError(
            f"The caption {path} is not written in UTF-8 ({error.reason}). Save it as UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 of plain English is valid UTF-8 with a zero behind each letter
        raise DiffgraftError(f"The caption {path} is not written in UTF-8 (it holds zero bytes). Save it as UTF-8.")
    return text


def _of_formats(files: Sequence[Path], folder: Path) -> Iterator[str]:
    if found := [path for path in files if path.suffix.lower() in _UNREADABLE]:
        yield (
            f"{pluralize(len(found), 'file')} in {folder} {_are(len(found))} of a format that cannot be read, and not "
            f"learnt from: {named(found)}. Save such pictures as JPEG or PNG."
        )


def _without_suffix(files: Sequence[Path]) -> Iterator[str]:
    """Pictures by their content whose names do not say so."""
    known = (*SUFFIXES, *_UNREADABLE, *CAPTIONS, *_TABLE_KINDS)
    strange = [path for path in files if path.suffix.lower() not in known and not path.name.startswith(".")]
    if found := [path for path in strange[:_SNIFFED] if _begins_as_picture(path)]:
        yield (
            f"{named(found)} {'holds' if len(found) == 1 else 'hold'} a picture, and {_are(len(found))} not learnt "
            "from: the name does not end as those of pictures do (.jpg, .png, …). Rename it."
        )


def _begins_as_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _of_broken_links(folder: Path) -> Iterator[str]:
    links = (path for path in sorted(folder.iterdir()) if path.is_symlink() and path.suffix.lower() in SUFFIXES)
    if found := [path for path in links if not path.exists()]:
        yield f"{pluralize(len(found), 'link')} in {folder} {_lead(len(found))} to no picture: {named(found)}."


def _like_masks(pictures: Sequence[Path]) -> Iterator[str]:
    """Pictures that are called as the masks of others are elsewhere."""
    stems = {(path.parent, _stem(path.stem)) for path in pictures}
    found = [
        path
        for path in pictures
        if (match := _LIKE_MASK.fullmatch(path.stem)) and (path.parent, _stem(match[1])) in stems
    ]
    if found:
        yield f"{named(found)} {_are(len(found))} learnt as pictures: if they are masks, call them NAME_mask.png."


def _of_other_words(pictures: Sequence[Path], files: Sequence[Path], folder: Path) -> Iterator[str]:
    """Files that may hold captions and are not looked into."""
    stems = {_stem(one) for path in pictures for one in (path.stem, path.name)}
    tables = [name for name in TABLES if any(path.name == name for path in files)]
    beside = [
        path
        for path in files
        if path.suffix.lower() in (*_TABLE_KINDS, ".tags", ".cap", ".text") and _stem(path.stem) in stems
    ]
    if beside:
        yield (
            f"What {named(beside)} says of the picture beside it is not read: captions are files that end in .txt or "
            "in .caption."
        )
    strange = [path for path in files if path.suffix.lower() in _TABLE_KINDS[:5] and path not in beside]
    strange = [path for path in strange if path.name not in tables]
    if strange:
        yield f"{named(strange)} in {folder} is not read: a table of captions is called {' or '.join(TABLES)}" + (
            f", and here {tables[0]} is the one." if tables else "."
        )


def _in_subfolders(folder: Path, in_table: Collection[Path], used: Collection[Path]) -> Iterator[str]:
    places: Counter[str] = Counter()
    for path in _below(folder, used):
        if path.parent != folder and not (in_table and path.resolve() in in_table):
            places[_first_level(path, folder)] += 1
    if places:
        yield (
            f"{pluralize(places.total(), 'picture')} in subfolders of {folder} {_are(places.total())} not learnt from: "
            f"{_listed(places)}. Move them up, name the folders as kohya does (10_sks dog), or give each as a concept."
        )


def _below(folder: Path, used: Collection[Path]) -> Iterator[Path]:
    """Picture files in a folder and all below it, but for hidden folders and those of other use; masks left out."""
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
        if (seen := seen + len(names)) > _MOST_ENTRIES:
            return


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _first_level(path: Path, folder: Path) -> str:
    first, *rest = path.relative_to(folder).parts
    return f"{first}/" if rest else "the folder itself"


def _listed(places: Counter[str]) -> str:
    return ", ".join(f"{count} in {place}" for place, count in places.items())


def pluralize(number: int, what: str) -> str:
    """A number of things: "1 picture", "1,200 pictures"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _belong(number: int) -> str:
    return "belongs" if number == 1 else "belong"


def _lead(number: int) -> str:
    return "leads" if number == 1 else "lead"


def _it(number: int) -> str:
    return "it is" if number == 1 else "one of them is"
