"""What people type, taken apart: settings, adapters with strengths, sizes."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.progress import REPORTERS, Note, emit, reporting
from diffgraft.terminal import printable

_SAID: list[str] = []
"""Lines shown so far"""
_MAX_STRENGTH = 20
"""Largest strength; beyond it any adapter gives noise or black pictures"""


def say(line: object) -> None:
    """Show a line on stdout, with control characters escaped."""
    _SAID.append(printable(line))
    typer.echo(_SAID[-1])


def warn(message: object) -> None:
    """Show a warning on stderr, unless an earlier line already contains it."""
    text = printable(message)
    if not any(text in line for line in _SAID):
        typer.secho(f"warning: {text}", fg="yellow", err=True)


@contextmanager
def shown_progress(name: str) -> Iterator[None]:
    """Show progress within the block by a reporter of `diffgraft.progress.REPORTERS`; with ``json`` also warnings.

    Raises:
        DiffgraftError: `name` is not a reporter.
    """
    if name not in REPORTERS:
        raise DiffgraftError(f"Invalid --progress {name}: {did_you_mean(name, REPORTERS)}")
    if name == "auto":
        yield
        return
    usual = warnings.showwarning
    if name == "json":
        warnings.showwarning = lambda message, *_, **__: emit(Note(str(message), is_warning=True))
    try:
        with reporting(REPORTERS[name]()):
            yield
    finally:
        warnings.showwarning = usual


def say_json(value: Any) -> None:
    """Show a value as JSON; infinite numbers and NaN, which JSON does not have, become null."""
    typer.echo(json.dumps(_finite(value), indent=1, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def key_values(words: Sequence[str]) -> dict[str, str]:
    """Parse ``key=value`` words to a mapping.

    Raises:
        DiffgraftError: a word is something else; for options like those of other tools it suggests the setting.
    """
    out: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("-"):
            option, equals, value = word.lstrip("-").partition("=")
            follows = next(iter(words[place + 1 : place + 2]), "true")
            value = value if equals else "true" if follows.startswith("-") or "=" in follows else follows
            raise DiffgraftError(f"Settings have no dashes: write {_named(option)}={value} in the place of {word}.")
        key, equals, value = word.partition("=")
        if not equals or not key:
            hint = ""
            if place and words[place - 1].endswith("="):
                hint = f" After {words[place - 1]} there is a blank: write {words[place - 1]}{word} without it."
            raise DiffgraftError(
                f"{word!r} is not a setting: write key=value, such as steps=300 or images=my_dog/.{hint}"
            )
        if key in out:
            raise DiffgraftError(f"{key} is given twice, as {key}={out[key]} and {key}={value}: leave one out.")
        out[key] = value
    return out


def _named(option: str) -> str:
    """Return the setting that corresponds to an option of another tool."""
    from diffgraft.trainers.recipe.synonyms import synonym

    return synonym(option) or option.replace("-", "_")


def parse_strengths(arguments: Sequence[str]) -> dict[str, float | dict[str, float] | list[float]]:
    """Parse ``FILE``, ``FILE:STRENGTH``, ``FILE:PART=STRENGTH,…`` or ``FILE:1,0.5,…`` (by block); 1 by default."""
    out: dict[str, float | dict[str, float] | list[float]] = {}
    for word in arguments:
        file, colon, tail = word.rpartition(":")
        if not colon or tail.endswith(".safetensors") or "/" in tail or "\\" in tail:
            file, tail = word, "1"
        strength: float | dict[str, float] | list[float]
        if "=" in tail:
            parts = (part.partition("=") for part in tail.split(","))
            strength = {name.strip(): _number(value, word) for name, _, value in parts}
        elif "," in tail:
            strength = [_number(value, word) for value in tail.split(",")]
        else:
            strength = _number(tail, word)
        if file not in out:
            out[file] = strength
        elif isinstance(earlier := out[file], float) and isinstance(strength, float):
            out[file] = earlier + strength
        else:
            raise DiffgraftError(f"{file} is given twice, once with strengths for its parts: give it once.")
    return out


def _number(text: str, word: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number != number or abs(number) == float("inf"):
        raise DiffgraftError(
            f"The strength in {word!r} is not a number: write FILE:0.8, FILE:unet=0.8,text_encoder=0.5, FILE:1,0.5,… "
            "with 12 to 26 numbers for the blocks, or FILE alone for strength 1."
        )
    if abs(number) > _MAX_STRENGTH:
        raise DiffgraftError(
            f"The strength in {word!r} is beyond ±{_MAX_STRENGTH}: 1 is the adapter as trained, 0 to 1 is usual."
        )
    return number


def width_height(word: str) -> tuple[int, int] | None:
    """Parse ``WIDTHxHEIGHT``, or one number for both, to (width, height); None for an empty word."""
    if not word:
        return None
    parts = word.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise DiffgraftError(f"The size {word!r} cannot be read: write WIDTHxHEIGHT in pixels, such as 96x64.")
    return int(parts[0]), int(parts[-1])
