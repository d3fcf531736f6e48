"""Report on each key of another tool's configuration: mapped to a recipe key, dropped with a reason, or a default."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from diffgraft.errors import DiffgraftError, did_you_mean

_SECRET = re.compile(r"huggingface_token|api_key|password")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


@dataclass(frozen=True)
class Line:
    """A line of the report, about one key."""

    key: str
    """The other tool's key, as the file spells it"""
    value: Any
    note: str
    """The recipe key that it was mapped to; or why it was dropped, and what to do"""
    is_default: bool = False
    """Whether the file does not have the key, and the value is the tool's default"""

    @property
    def assignment(self) -> str:
        """Key and value, as `key = value`; secrets are hidden."""
        value = "(hidden)" if _SECRET.search(self.key) and self.value else short(self.value)
        return f"{self.key} = {value}"

    def __str__(self) -> str:
        return self.assignment + self.note


@dataclass
class ImportReport:
    """A configuration of another tool, the recipe made from it, and a record of what became of each key."""

    tool: str
    """Name of the other tool"""
    values: dict[str, Any]
    """The tool's key → its value, for all keys in the file"""
    defaults: Mapping[str, Any]
    """Every known key of the tool → its default"""
    file_keys: dict[str, str] = field(default_factory=dict)
    """The tool's key → the key in the file, where they differ"""
    file_values: dict[str, Any] = field(default_factory=dict)
    """The tool's key → the value in the file, where it differs from that in `values`"""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Recipe key, with dots if nested → value"""
    mapped: list[tuple[str, Line]] = field(default_factory=list)
    """Recipe key, and the line about the key that it was mapped from"""
    dropped: list[Line] = field(default_factory=list)
    """Lines about keys without a counterpart, or with a partial one"""
    unread: list[str] = field(default_factory=list)
    """Keys in the file that have no effect on the recipe"""
    todos: dict[str, str] = field(default_factory=dict)
    """Recipe keys that the user has to set → what to set"""

    def get(self, key: str) -> Any:
        """Value of a key, or the tool's default; None if it is empty."""
        value = self.values.get(key)
        return self.defaults[key] if value is None or value == "" else value

    def is_set(self, key: str) -> bool:
        """Whether the file sets the key to something other than the default."""
        return not _same(self.get(key), self.defaults[key])

    def number(self, key: str) -> float | None:
        """Value of a key as a number; None if it is empty.

        Raises:
            DiffgraftError: it is not a number.
        """
        return as_number(self.file_key(key), self.get(key))

    def integer(self, key: str) -> int | None:
        """Value of a key as an integer; None if it is empty.

        Raises:
            DiffgraftError: it is not an integer.
        """
        value = self.number(key)
        if value is not None and not value.is_integer():
            raise DiffgraftError(
                f"Invalid value {self.file_key(key)}={value} in the configuration: must be an integer."
            )
        return None if value is None else int(value)

    def flag(self, key: str) -> bool:
        """Value of a key as a boolean."""
        value = self.get(key)
        return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)

    def text(self, key: str) -> str:
        """Value of a key as text; empty if there is none."""
        value = self.get(key)
        return "" if value is None else str(value)

    def file_key(self, key: str) -> str:
        """Name of a key in the file."""
        return self.file_keys.get(key, key)

    def map(self, recipe_key: str, value: Any, *keys: str, remark: str = "") -> None:
        """Set a recipe key, and record that it was made from these keys of the tool."""
        self.recipe[recipe_key] = value
        note = f" → {recipe_key}: {short(value)}" + (f" ({remark})" if remark else "")
        in_file = [key for key in keys if self.values.get(key) not in (None, "")]
        self.mapped += [(recipe_key, Line(self.file_key(key), self._file_value(key), note)) for key in in_file]
        if keys and not in_file:
            default = Line(self.file_key(keys[0]), self.defaults[keys[0]], f", the default of {self.tool}{note}", True)
            self.mapped.append((recipe_key, default))

    def map_part(self, recipe_key: str, value: Any, name: str, file_value: Any, remark: str = "") -> None:
        """Set a recipe key from a part of an imported key, and report that part as `name` with `file_value`."""
        self.recipe[recipe_key] = value
        note = f" → {recipe_key}: {short(value)}" + (f" ({remark})" if remark else "")
        self.mapped.append((recipe_key, Line(name, file_value, note)))

    def drop(self, key: str, why: str) -> None:
        """Record that a key of the tool has no counterpart, or only a partial one."""
        self.drop_part(self.file_key(key), self._file_value(key), why)

    def drop_part(self, name: str, value: Any, why: str) -> None:
        """Record that a part of a key, described by `name`, has no counterpart."""
        self.dropped.append(Line(name, value, f": {why}"))

    def withdraw(self, recipe_key: str, why: str) -> None:
        """Remove a recipe key that was set, and record that the keys it was mapped from are dropped."""
        if recipe_key not in self.recipe:
            return
        del self.recipe[recipe_key]
        gone = [line for key, line in self.mapped if key == recipe_key]
        self.dropped += [Line(line.key, line.value, f": {why}") for line in gone if not line.is_default]
        self.mapped = [entry for entry in self.mapped if entry[0] != recipe_key]

    def todo(self, recipe_key: str, why: str) -> None:
        """Record that the user has to set a recipe key."""
        self.todos[recipe_key] = why

    def drop_unknown(self) -> None:
        """Record the keys in the file that are not known keys of the tool."""
        for key in self.values:
            if key not in self.defaults:
                hint = did_you_mean(key, self.defaults)
                suffix = f" ({hint})" if hint.startswith("did you mean") else ""
                self.drop_part(self.file_key(key), self.values[key], f"this is not a known key of {self.tool}{suffix}.")

    def finalize(self, defaults: Mapping[str, Any]) -> None:
        """Remove recipe keys that have their default; `defaults` maps keys, with dots if nested, to values."""
        redundant = {key for key, value in self.recipe.items() if key in defaults and defaults[key] == value}
        self.recipe = {key: value for key, value in self.recipe.items() if key not in redundant}
        self.mapped = [(recipe_key, line) for recipe_key, line in self.mapped if recipe_key not in redundant]

    def sections(self) -> list[tuple[str, list[str]]]:
        """The report as text: titles with their lines; empty sections are left out."""
        assignments: dict[str, list[str]] = {}
        for line in self.dropped:
            assignments.setdefault(line.note, []).append(line.assignment)
        defaulted = ", ".join(self.defaulted_keys())
        sections = [
            ("Mapped", list(dict.fromkeys(str(line) for _, line in self.mapped))),
            ("Dropped, or mapped in part", [", ".join(group) + note for note, group in assignments.items()]),
            ("Ignored: equal to the default, or without effect on the result", [defaulted] if defaulted else []),
            ("To do by hand", [f"{key}: {why}" for key, why in self.todos.items()]),
        ]
        return [(title, lines) for title, lines in sections if lines]

    def defaulted_keys(self) -> list[str]:
        """Keys in the file that are equal to the default, or have no effect beside the others."""
        listed = {line.key for line in [*(line for _, line in self.mapped), *self.dropped]}
        names = [*map(self.file_key, self.values), *self.unread]
        listed |= {key.partition(" ")[0] for key in listed}
        return [name for name in dict.fromkeys(names) if name not in listed]

    def _file_value(self, key: str) -> Any:
        return self.file_values.get(key, self.get(key))


@dataclass(frozen=True)
class KeyRule:
    """How a key of another tool is mapped to a recipe key, or why it is not."""

    default: Any = None
    """The tool's default"""
    recipe_key: str = ""
    """The recipe key, or empty"""
    value_map: Mapping[Any, Any] | None = None
    """The tool's value → the recipe's value, where they have other names"""
    kind: type = str
    """Type of the value: str, bool, int or float"""
    remark: str = ""
    """Remark in the report if the key is mapped"""
    why: str = ""
    """Reason for dropping the key, and what to do"""


def map_table(report: ImportReport, table: Mapping[str, KeyRule]) -> None:
    """Map or drop all keys of a table; keys with neither recipe key nor reason are left to other functions."""
    read = {bool: report.flag, int: report.integer, float: report.number, str: report.get}
    for key, rule in table.items():
        value = read[rule.kind](key)
        if rule.value_map is not None and isinstance(value, Hashable) and value in rule.value_map:
            value = rule.value_map[value]
        elif rule.value_map is not None and value is not None:
            choices = ", ".join(map(str, rule.value_map.values()))
            report.drop(key, f"{rule.recipe_key} can only be {choices}: set it by hand.")
            continue
        if rule.recipe_key and value is not None and (value or report.is_set(key)):
            report.map(rule.recipe_key, value, key, remark=rule.remark)
        elif rule.why and report.is_set(key):
            report.drop(key, rule.why)


def unsupported(why: str, **keys: Any) -> dict[str, KeyRule]:
    """Rules for keys, given with their defaults, that are dropped for the same reason."""
    return {key: KeyRule(default, why=why) for key, default in keys.items()}


def defaults_of(*tables: Mapping[str, KeyRule]) -> dict[str, Any]:
    """Default of every key in the tables."""
    return {key: rule.default for table in tables for key, rule in table.items()}


def as_number(name: str, value: Any) -> float | None:
    """A value as a number; None if it is empty. `name` is the key in error messages.

    Raises:
        DiffgraftError: it is not a finite number.
    """
    if value is None or value is False:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        with suppress(OverflowError):  # an integer of hundreds of digits
            if math.isfinite(number := float(value)):
                return number
    raise DiffgraftError(f"Invalid value {name}={short(value)!r} in the configuration: must be a number.")


def as_side(value: Any) -> int | None:
    """A value as the side of images in pixels; None if it is something else."""
    text = str(value).strip() if isinstance(value, int | str) else ""
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else None


def parse_pairs(words: Iterable[Any], name: str) -> dict[str, str]:
    """``key=value`` words as a mapping. `name` is the key in error messages.

    Raises:
        DiffgraftError: a word is not of that form.
    """
    values = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals or not key.strip():
            raise DiffgraftError(f"Invalid value in {name}: {short(word)!r} is not of the form key=value.")
        values[key.strip()] = value.strip().strip("\"'")
    return values


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, str) and isinstance(default, int | float) and _NUMBER.fullmatch(value):
        value = float(value)
    empty: tuple[Any, ...] = (None, "", False, [], {})
    return bool(value == default) or (value in empty and default in empty)


def short(value: Any) -> str:
    """A value on one line, truncated if it is long."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} entries"
    text = (str(value).lower() if isinstance(value, bool) else str(value)).replace("\n", " ⏎ ")
    return text if len(text) < 80 else f"{text[:77]}…"
