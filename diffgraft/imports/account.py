"""What became of each key of another tool's configuration: taken, without a counterpart, or saying only the default."""

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
    """One line of the account."""

    key: str
    """Theirs, as it stands in the file"""
    value: Any
    said: str
    """What was made of it, or why nothing was and what to do"""

    @property
    def left(self) -> str:
        """Key and value."""
        value = "(kept to itself)" if _SECRET.search(self.key) and self.value else short(self.value)
        return f"{self.key} = {value}"

    def __str__(self) -> str:
        return self.left + self.said


@dataclass
class Account:
    """A configuration as it is read, and the recipe that comes of it."""

    tool: str
    """Whose it is"""
    given: dict[str, Any]
    """Their key → value, as far as the file says it"""
    defaults: Mapping[str, Any]
    """All their keys → what the tool takes where the file does not say it"""
    names: dict[str, str] = field(default_factory=dict)
    """Their key → what it is called in the file, where that is something else"""
    shown: dict[str, Any] = field(default_factory=dict)
    """Their key → its value in the file, where that is something else"""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Our key, nested ones with dots → value"""
    taken: list[tuple[str, Line]] = field(default_factory=list)
    """Our key, and what it was made of"""
    lost: list[Line] = field(default_factory=list)
    """What has no counterpart, or not all of it"""
    idle: list[str] = field(default_factory=list)
    """Keys in the file that are not handed on by what reads it first"""
    open: dict[str, str] = field(default_factory=dict)
    """Our keys that a person has to set, and why"""

    def get(self, key: str) -> Any:
        """Its value, or the tool's default; None where it is empty."""
        value = self.given.get(key)
        return self.defaults[key] if value is None or value == "" else value

    def has(self, key: str) -> bool:
        """Whether the file says it, and something else than the default."""
        return not _same(self.get(key), self.defaults[key])

    def number(self, key: str) -> float | None:
        """Its value as a number; None where there is none.

        Raises:
            DiffgraftError: it is something else.
        """
        return as_number(self.name(key), self.get(key))

    def whole(self, key: str) -> int | None:
        """Its value as a whole number; None where there is none.

        Raises:
            DiffgraftError: it is something else.
        """
        found = self.number(key)
        if found is not None and not found.is_integer():
            raise DiffgraftError(f"{self.name(key)}={found} in this file should be a whole number.")
        return None if found is None else int(found)

    def flag(self, key: str) -> bool:
        """Its value as yes or no."""
        value = self.get(key)
        return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)

    def text(self, key: str) -> str:
        """Its value as text, empty where there is none."""
        value = self.get(key)
        return "" if value is None else str(value)

    def name(self, key: str) -> str:
        """What it is called in the file."""
        return self.names.get(key, key)

    def take(self, ours: str, value: Any, *of: str, remark: str = "") -> None:
        """Write one of our keys, made of these of theirs."""
        self.recipe[ours] = value
        said = f" → {ours}: {short(value)}" + (f" ({remark})" if remark else "")
        stated = [key for key in of if self.given.get(key) not in (None, "")]
        self.taken += [(ours, Line(self.name(key), self._there(key), said)) for key in stated]
        if of and not stated:
            self.taken.append((ours, Line(self.name(of[0]), self.defaults[of[0]], f", the default there{said}")))

    def take_part(self, ours: str, value: Any, name: str, there: Any, remark: str = "") -> None:
        """The same, of what is no key of its own, but a part of one that is called `name` and has the value `there`."""
        self.recipe[ours] = value
        said = f" → {ours}: {short(value)}" + (f" ({remark})" if remark else "")
        self.taken.append((ours, Line(name, there, said)))

    def lose(self, key: str, why: str) -> None:
        """A key of theirs has no counterpart, or not with all that it means."""
        self.aside(self.name(key), self._there(key), why)

    def aside(self, name: str, value: Any, why: str) -> None:
        """The same of what is no key of its own, but a part of one."""
        self.lost.append(Line(name, value, f": {why}"))

    def ask(self, ours: str, why: str) -> None:
        """A person has to set one of our keys."""
        self.open[ours] = why

    def unknown(self) -> None:
        """Put the keys on the account that the tool, as far as is known here, does not have."""
        for key in self.given:
            if key not in self.defaults:
                hint = did_you_mean(key, self.defaults)
                more = f" ({hint})" if hint.startswith("did you mean") else ""
                self.aside(self.name(key), self.given[key], f"no key of {self.tool} that is known here{more}.")

    def settle(self, defaults: Mapping[str, Any]) -> None:
        """Leave out of the recipe what is ours by default (our key, nested with dots → value)."""
        idle = {key for key, value in self.recipe.items() if key in defaults and defaults[key] == value}
        self.recipe = {key: value for key, value in self.recipe.items() if key not in idle}
        self.taken = [(ours, line) for ours, line in self.taken if ours not in idle]

    def report(self) -> list[tuple[str, list[str]]]:
        """What to tell a person: titles, and their lines."""
        because: dict[str, list[str]] = {}
        for line in self.lost:
            because.setdefault(line.said, []).append(line.left)
        plain = ", ".join(self.plain())
        sections = [
            ("Taken", list(dict.fromkeys(str(line) for _, line in self.taken))),
            ("Without a counterpart, or not all of it", [", ".join(left) + said for said, left in because.items()]),
            ("Left out, for it says only the default or changes nothing of what is learnt", [plain] if plain else []),
            ("To be set by hand", [f"{key}: {why}" for key, why in self.open.items()]),
        ]
        return [(title, lines) for title, lines in sections if lines]

    def plain(self) -> list[str]:
        """Keys in the file that only say the default, or have no effect beside the others."""
        told = {line.key for line in [*(line for _, line in self.taken), *self.lost]}
        names = [*map(self.name, self.given), *self.idle]
        part_of = {key.partition(" ")[0] for key in told}
        return [name for name in dict.fromkeys(names) if name not in told | part_of]

    def _there(self, key: str) -> Any:
        return self.shown.get(key, self.get(key))


@dataclass(frozen=True)
class Key:
    """A key of theirs that stands for one of ours, or for none."""

    default: Any = None
    """What the tool takes where the file does not say it"""
    to: str = ""
    """Our key"""
    words: Mapping[Any, Any] | None = None
    """Their values → ours, where they are called something else"""
    kind: type = str
    """What the value should be: str, bool, int or float"""
    remark: str = ""
    """Said where it is taken"""
    why: str = ""
    """Where it has no counterpart: why, and what to do"""


def walk(account: Account, table: Mapping[str, Key]) -> None:
    """Put the keys of a table on the account; those with neither counterpart nor reason are read by others."""
    read = {bool: account.flag, int: account.whole, float: account.number, str: account.get}
    for key, rule in table.items():
        value = read[rule.kind](key)
        if rule.words is not None and isinstance(value, Hashable) and value in rule.words:
            value = rule.words[value]
        elif rule.words is not None and value is not None:
            account.lose(key, f"{rule.to} has {', '.join(map(str, rule.words.values()))} alone: set it by hand.")
            continue
        if rule.to and value is not None and (value or account.has(key)):
            account.take(rule.to, value, key, remark=rule.remark)
        elif rule.why and account.has(key):
            account.lose(key, rule.why)


def nothing(why: str, **keys: Any) -> dict[str, Key]:
    """Keys that have no counterpart for the same reason, and their defaults."""
    return {key: Key(default, why=why) for key, default in keys.items()}


def only(*tables: Mapping[str, Key]) -> dict[str, Any]:
    """All keys of some tables → their defaults."""
    return {key: rule.default for table in tables for key, rule in table.items()}


def as_number(name: str, value: Any) -> float | None:
    """A value called `name` as a number; None where there is none.

    Raises:
        DiffgraftError: it is something else.
    """
    if value is None or value is False:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        with suppress(OverflowError):  # a whole number of hundreds of digits
            if math.isfinite(found := float(value)):
                return found
    raise DiffgraftError(f"{name}={short(value)!r} in this file should be a number.")


def as_side(value: Any) -> int | None:
    """A value as the side of pictures in pixels; None where it is something else."""
    text = str(value).strip() if isinstance(value, int | str) else ""
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else None


def pairs(words: Iterable[Any], where: str) -> dict[str, str]:
    """``key=value`` words as a mapping.

    Raises:
        DiffgraftError: a word is something else.
    """
    found = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals or not key.strip():
            raise DiffgraftError(f"{where} should be a list of key=value, and holds {short(word)!r}.")
        found[key.strip()] = value.strip().strip("\"'")
    return found


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, str) and isinstance(default, int | float) and _NUMBER.fullmatch(value):
        value = float(value)
    empty: tuple[Any, ...] = (None, "", False, [], {})
    return bool(value == default) or (value in empty and default in empty)


def short(value: Any) -> str:
    """A value on one line, cut where it is long."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} of them"
    text = (str(value).lower() if isinstance(value, bool) else str(value)).replace("\n", " ⏎ ")
    return text if len(text) < 80 else f"{text[:77]}…"
