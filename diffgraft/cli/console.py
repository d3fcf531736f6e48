"""What people type, taken apart: settings, adapters with strengths, sizes; and lines for them to read."""

from collections.abc import Sequence

import typer

from diffgraft.errors import DiffgraftError, printable


def say(*lines: object) -> None:
    """Print lines; what could steer a terminal in them, names and texts of files being anyone's, is spelled out."""
    for line in lines:
        typer.echo(printable(line))


def complain(text: str, colour: str) -> None:
    """Print a line in a colour, where errors go, in the same way."""
    typer.secho(printable(text), fg=colour, err=True)


def key_values(words: Sequence[str]) -> dict[str, str]:
    """``key=value`` words as a mapping."""
    out = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise DiffgraftError(f"{word!r} is no setting: write key=value, such as steps=300 or images=my_dog/.")
        out[key] = value
    return out


def strengths(words: Sequence[str]) -> dict[str, float | dict[str, float] | list[float]]:
    """``FILE``, ``FILE:STRENGTH``, ``FILE:PART=STRENGTH,…`` or ``FILE:1,0.5,…`` (by block); without one it is 1."""
    out: dict[str, float | dict[str, float] | list[float]] = {}
    for word in words:
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
            f"The strength in {word!r} is no number: write FILE:0.8, FILE:unet=0.8,text_encoder=0.5, 12 to 26 numbers "
            "for the blocks, or FILE alone for strength 1."
        )
    return number


def width_height(word: str) -> tuple[int, int] | None:
    """``WIDTHxHEIGHT`` (or one number for both) as a pair; None for an empty word."""
    if not word:
        return None
    parts = word.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise DiffgraftError(f"The size {word!r} cannot be read: write WIDTHxHEIGHT in pixels, such as 96x64.")
    return int(parts[0]), int(parts[-1])
