"""Tables of captions: `metadata.jsonl` or `metadata.csv` beside pictures, one row a picture, or several of one."""

import csv
import json
import math
import os
import posixpath
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffgraft.data.inventory import TABLES, is_mask_or_condition, named
from diffgraft.data.pictures import SUFFIXES
from diffgraft.errors import DiffgraftError, did_you_mean

_CAPTIONS = ("text", "caption", "captions", "prompt")
"""What columns of captions are usually called"""


def read_table(folder: Path, caption_column: str = "", *, outside: bool = False) -> dict[Path, tuple[str, ...]]:
    """Picture → its captions, of the folder's table; empty where it has none.

    Names are paths from the folder on, or whole ones; several rows of one picture are its captions, in their order.

    Args:
        folder: where the table lies.
        caption_column: the column with the captions; empty: text, caption, captions or prompt.
        outside: whether rows may name pictures that lie elsewhere.

    Raises:
        DiffgraftError: the table cannot be read, lacks a column, or names what lies outside the folder.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    if other := [name for name in TABLES if name != path.name and (folder / name).is_file()]:
        warnings.warn(f"{folder} has two tables of captions: {path.name} is read, and {other[0]} is not.", stacklevel=3)
    rows = list(_rows(path))
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if not rows:
        raise DiffgraftError(
            f"{path} cannot be read as a table: it has no rows. Give it a row a picture, or remove it."
        )
    if "file_name" not in columns:
        raise DiffgraftError(f"{path} has the columns {', '.join(columns)}, and needs one called file_name.")
    column = find_caption_column(columns, caption_column, str(path))
    if not caption_column and len(also := [name for name in _CAPTIONS if name in columns]) > 1:
        warnings.warn(
            f"{path} has {len(also)} columns of captions, {', '.join(also)}: {column} is read. Choose another by "
            "caption_column.",
            stacklevel=3,
        )
    found: dict[Path, dict[str, None]] = {}
    missing: list[str] = []
    others: list[str] = []
    for line, row in rows:
        place = _placed(folder, row.get("file_name"), f"{path}, line {line}", outside)
        if not place.is_file():
            missing.append(str(row["file_name"]))
            continue
        if place.suffix.lower() not in SUFFIXES or is_mask_or_condition(place):
            others.append(str(row["file_name"]))
            continue
        said = parse_captions(row.get(column), f"{path}, line {line}, column {column}") if column else ()
        found.setdefault(place, {}).update(dict.fromkeys(said))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(f"The table in {folder} names {missing[0]}{more}, and there is no such file.", stacklevel=3)
    if others:
        warnings.warn(
            f"The table in {folder} names what is no picture to learn from, and is left out: {named(others)}.",
            stacklevel=3,
        )
    if not column:
        what = f"{path} has no column of captions ({', '.join(_CAPTIONS)}), but: {', '.join(columns)}."
        warnings.warn(f"{what} Name one as caption_column.", stacklevel=3)
    if column and (silent := [place.name for place, said in found.items() if not said]):
        warnings.warn(f"The table in {folder} says nothing of {named(silent)}.", stacklevel=3)
    return {place: tuple(said) for place, said in found.items()}


def find_caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """The column with the captions: the one wanted or, if none is, one that is called as such; empty without.

    Raises:
        DiffgraftError: there is no column of the name wanted.
    """
    if wanted and wanted not in columns:
        raise DiffgraftError(f"{where} has no column {wanted!r}: {did_you_mean(wanted, columns)}")
    return wanted or next((name for name in _CAPTIONS if name in columns), "")


def parse_captions(value: Any, where: str) -> tuple[str, ...]:
    """A cell, which may hold one caption or a list of them.

    Raises:
        DiffgraftError: it holds something else.
    """
    listed = value if isinstance(value, list) else [value]
    listed = [one for one in listed if not (isinstance(one, float) and math.isnan(one))]  # an empty cell of pandas'
    strange = [one for one in listed if isinstance(one, Mapping | list | bool)]
    if strange:
        raise DiffgraftError(f"{where} holds {type(strange[0]).__name__}: write a caption, or a list of captions.")
    return tuple(text for one in listed if one is not None and (text := str(one).strip()))


def inside(folder: Path, path: Path) -> bool:
    """Whether a file lies in a folder or below it, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def check_inside(folder: Path, path: Path, where: str) -> None:
    """Raises DiffgraftError where a file leads out of a folder."""
    try:
        is_inside = inside(folder, path)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it leads in circles"
        raise DiffgraftError(f"{where} is a link that cannot be followed ({why}). Remove it.") from error
    if not is_inside:
        raise DiffgraftError(
            f"{where} leads to {path.resolve()}, outside of {folder}. Move it there or, if that is meant, set "
            "outside=true."
        )


def _placed(folder: Path, name: Any, where: str, outside: bool) -> Path:
    """The file that a row names."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DiffgraftError(f"{where} names no file: file_name is {name!r}.")
    try:
        plain = name.strip() if os.sep == "\\" or (folder / name).exists() else name.strip().replace("\\", "/")
        plain = plain if Path(plain).is_absolute() else posixpath.normpath(plain)
        known = dict.fromkeys((plain, *(unicodedata.normalize(one, plain) for one in _FORMS)))
        forms = [folder / form for form in known]
        place = next((form for form in forms if form.is_file()), forms[0])
        if not outside:
            check_inside(folder, place, where)
        if place.is_absolute() != folder.is_absolute() or not place.is_relative_to(folder):
            place = folder / place.resolve().relative_to(folder.resolve()) if inside(folder, place) else place
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it leads in circles"
        raise DiffgraftError(f"{where} names a file that cannot be looked at: {name[:80]!r} ({why}).") from error
    return place


_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
"""Unicode's composed and decomposed forms, of which the table may have one and the disk the other"""


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number of its line and content of each row."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{path} is not written in UTF-8 ({error.reason}). Save it as UTF-8.") from error
    if path.suffix == ".csv":
        yield from _rows_of_csv(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_doubles)
        except json.JSONDecodeError as error:
            what = f"line {number}, column {error.colno}: {error.msg}"
            raise DiffgraftError(f"{path} cannot be read as a table: {what}. Each line is a JSON object.") from error
        except (ValueError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DiffgraftError(f"{path} cannot be read as a table: line {number}: {what}.") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DiffgraftError(f"{path} cannot be read as a table: line {number} is no JSON object, but a {kind}.")
        yield number, row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose equal keys JSON itself would keep the last alone."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"{twice!r} is there twice")
    return row


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {twice[0]!r} is there twice")
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than there are columns")
            yield reader.line_num, row
    except (ValueError, csv.Error) as error:
        raise DiffgraftError(f"{path} cannot be read as a table: {error}.") from error
    if names and not reader.line_num > 1:
        raise DiffgraftError(
            f"{path} has one line, {', '.join(names)}, and no rows below it: the first line names the columns, "
            "file_name and text."
        )
