"""Tables of captions: `metadata.jsonl` or `metadata.csv` in a folder of pictures, with one or more rows a picture."""

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

from diffgraft.data.inventory import TABLES, is_mask_or_condition, list_names
from diffgraft.data.pictures import SUFFIXES
from diffgraft.errors import DiffgraftError, did_you_mean

_CAPTIONS = ("text", "caption", "captions", "prompt")
"""Usual names of columns of captions"""


def read_table(folder: Path, caption_column: str = "", *, outside: bool = False) -> dict[Path, tuple[str, ...]]:
    """Read the folder's table and return picture → its captions; empty if the folder has no table.

    File names are relative to the folder, or absolute. Several rows of one picture give it several captions.

    Args:
        folder: folder with the table.
        caption_column: column with the captions; empty: text, caption, captions or prompt.
        outside: whether rows may name pictures outside of the folder.

    Raises:
        DiffgraftError: the table cannot be read, lacks a column, or names a file outside of the folder.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    if other := [name for name in TABLES if name != path.name and (folder / name).is_file()]:
        warnings.warn(f"{folder} has two tables of captions: {path.name} is read, {other[0]} is not.", stacklevel=3)
    rows = list(_rows(path))
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if not rows:
        raise DiffgraftError(
            f"{path} cannot be read as a table: it has no rows. Give it a row for each picture, or remove it."
        )
    if "file_name" not in columns:
        raise DiffgraftError(f"{path} lacks the column file_name; its columns are: {', '.join(columns)}.")
    column = find_caption_column(columns, caption_column, str(path))
    if not caption_column and len(also := [name for name in _CAPTIONS if name in columns]) > 1:
        warnings.warn(
            f"{path} has {len(also)} columns of captions, {', '.join(also)}: {column} is used. Choose another with "
            "caption_column.",
            stacklevel=3,
        )
    captions: dict[Path, dict[str, None]] = {}
    missing: list[str] = []
    others: list[str] = []
    for line, row in rows:
        picture = _resolve(folder, row.get("file_name"), f"{path}, line {line}", outside)
        if not picture.is_file():
            missing.append(str(row["file_name"]))
            continue
        if picture.suffix.lower() not in SUFFIXES or is_mask_or_condition(picture):
            others.append(str(row["file_name"]))
            continue
        texts = parse_captions(row.get(column), f"{path}, line {line}, column {column}") if column else ()
        captions.setdefault(picture, {}).update(dict.fromkeys(texts))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(f"The table in {folder} names files that do not exist: {missing[0]}{more}.", stacklevel=3)
    if others:
        warnings.warn(
            f"The table in {folder} names files that are no pictures, or masks; they are left out: "
            f"{list_names(others)}.",
            stacklevel=3,
        )
    if not column:
        warnings.warn(
            f"{path} has no column of captions ({', '.join(_CAPTIONS)}); its columns are: {', '.join(columns)}. Choose "
            "one with caption_column.",
            stacklevel=3,
        )
    if column and (without := [picture.name for picture, texts in captions.items() if not texts]):
        warnings.warn(
            f"The caption table in {folder} has no captions for {list_names(without)}: they are trained with the "
            "prompt alone. Add rows for them if they need some.",
            stacklevel=3,
        )
    return {picture: tuple(texts) for picture, texts in captions.items()}


def find_caption_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """Return the column with the captions: `wanted`, else one with a usual name, else an empty string.

    Raises:
        DiffgraftError: `wanted` is given and there is no such column.
    """
    if wanted and wanted not in columns:
        raise DiffgraftError(f"{where} has no column {wanted!r}: {did_you_mean(wanted, columns)}")
    return wanted or next((name for name in _CAPTIONS if name in columns), "")


def parse_captions(value: Any, where: str) -> tuple[str, ...]:
    """Return the captions in a cell of a table, which holds one caption or a list of them.

    Raises:
        DiffgraftError: it holds something else; the message begins with `where`, the name of the cell.
    """
    values = value if isinstance(value, list) else [value]
    values = [item for item in values if not (isinstance(item, float) and math.isnan(item))]  # pandas' empty cells
    invalid = [item for item in values if isinstance(item, Mapping | list | bool)]
    if invalid:
        raise DiffgraftError(f"{where} holds {type(invalid[0]).__name__}: write a caption, or a list of captions.")
    return tuple(text for item in values if item is not None and (text := str(item).strip()))


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file is in a folder or below it, after following links."""
    return path.resolve().is_relative_to(folder.resolve())


def check_inside(folder: Path, path: Path, where: str) -> None:
    """Raise DiffgraftError if a file is outside of a folder; the message begins with `where`, the name of the file."""
    try:
        inside = is_inside(folder, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "links form a loop"
        raise DiffgraftError(f"{where} is a link that cannot be followed ({reason}). Remove it.") from error
    if not inside:
        raise DiffgraftError(
            f"{where} is a file outside of {folder}: {path.resolve()}. Move it into the folder, or set outside=true to "
            "allow it."
        )


def _resolve(folder: Path, name: Any, where: str, outside: bool) -> Path:
    """Return the path of the file that a row names."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DiffgraftError(f"{where} names no file: file_name is {name!r}.")
    try:
        plain = name.strip() if os.sep == "\\" or (folder / name).exists() else name.strip().replace("\\", "/")
        plain = plain if Path(plain).is_absolute() else posixpath.normpath(plain)
        spellings = dict.fromkeys((plain, *(unicodedata.normalize(form, plain) for form in _FORMS)))
        candidates = [folder / spelling for spelling in spellings]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
        if not outside:
            check_inside(folder, path, where)
        if path.is_absolute() != folder.is_absolute() or not path.is_relative_to(folder):
            path = folder / path.resolve().relative_to(folder.resolve()) if is_inside(folder, path) else path
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "links form a loop"
        raise DiffgraftError(f"{where} names a file that cannot be opened: {name[:80]!r} ({reason}).") from error
    return path


_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
"""Unicode's composed and decomposed forms; the table may use one and the disk the other"""


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line number and the content of each row."""
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
            row = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            problem = f"line {number}, column {error.colno}: {error.msg}"
            raise DiffgraftError(
                f"{path} cannot be read as a table: {problem}. Each line must be a JSON object."
            ) from error
        except (ValueError, RecursionError) as error:
            problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DiffgraftError(f"{path} cannot be read as a table: line {number}: {problem}.") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DiffgraftError(f"{path} cannot be read as a table: line {number} is a {kind}, not a JSON object.")
        yield number, row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, or raise ValueError if a key is there twice; the json module would keep the last one."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
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
            f"{path} has no rows, only the line {', '.join(names)}: the first line names the columns, file_name and "
            "text."
        )
