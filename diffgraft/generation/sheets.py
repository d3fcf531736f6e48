"""Sheets of pictures over one to three axes (X/Y/Z plots): every combination of their values, with labels.

An axis is written as in webui's script, ``sampler=Euler,Heun``, ``steps=10-30 (+10)`` or ``guidance=1-9 [5]``. Its
name is

- a setting of `DrawSettings`, also ``hires.denoise``, ``clip_skip`` and ``emphasis``; or ``seed``;
- ``prompt``: the first value is searched in the prompt, and replaced by each value;
- an adapter in use: ``dog=0.4,0.8`` for its strength, or ``dog:OUT04=0,1`` for a block's;
- ``adapter``: files, patterns such as ``runs/dog/*.safetensors``, or names in the library, one at a time.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffgraft.adapters.strengths import BLOCKS, strengths_of
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.generation.adapter_library import usual_name
from diffgraft.generation.checks import checked_seeds
from diffgraft.generation.grammar.encode import Encoding
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.progress import phase

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*(?:\(\+?({_NUMBER})\)|\[(\d+)\])?\s*$")
_MOST_VALUES, _MOST_CELLS = 1000, 2500
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NESTED: dict[str, type] = {"hires": Hires, "encoding": Encoding}
_NO_AXES = ("hires", "encoding", "regions", "batch")
_KINDS: dict[type, dict[str, Any]] = {kind: get_type_hints(kind) for kind in (DrawSettings, Hires, Encoding)}
_SHORT = {"clip_skip": "encoding.clip_skip", "emphasis": "encoding.emphasis", "style": "encoding.style"}
"""Name of an axis → field of `DrawSettings`, with the name of the group"""
_PLAIN = [item.name for item in fields(DrawSettings) if item.name not in _NO_AXES]
_LINE, _GAP = 20, 6
"""Height of a label and width of the space between pictures, in pixels"""


@dataclass(frozen=True)
class Axis:
    """An axis of an X/Y/Z plot: a setting and its values."""

    name: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Axis":
        """Parse one axis of a sheet, ``name=value,value``; values with commas are quoted, and ``1-5`` is a range.

        Raises:
            DiffgraftError: there is no name, no value, or a range of more than 1,000 values.
        """
        name, equals, listed = text.partition("=")
        try:
            rows = list(csv.reader([listed], skipinitialspace=True))
        except csv.Error as error:
            raise DiffgraftError(f"The axis {short_repr(text)} cannot be read: {error}.") from error
        values = tuple(value for word in (rows[0] if rows else []) for value in _spread(name, word.strip()))
        if not equals or not name.strip() or not values:
            raise DiffgraftError(f"The axis {text!r} cannot be read: write name=value,value, such as steps=10,20,30.")
        return cls(name.strip(), values)


@dataclass(frozen=True)
class Cell:
    """What one picture of a sheet is drawn with."""

    prompt: str
    seed: int
    settings: DrawSettings
    adapters: tuple[tuple[str, str, str], ...] = ()
    """(adapter, block or empty, strength) of each change; a file or name in the library has the block ``use``"""


def draw_sheet(
    session: Session,
    start: Cell,
    axes: Sequence[Axis],
    image: ImageInput | None = None,
) -> Image.Image:
    """Draw all combinations of up to three axes: the first to the right, the second downwards, the third in sheets.

    Args:
        session: session that draws; its adapters are as before afterwards.
        start: prompt, seed and settings that the axes change.
        axes: one to three axes.
        image: picture that all of them start from.

    Raises:
        DiffgraftError: an axis has an unknown name or an invalid value, which is found before anything is drawn.
    """
    if not 1 <= len(axes) <= 3:
        raise DiffgraftError(f"A sheet has one to three axes, not {len(axes)}.")
    count = prod(len(axis.values) for axis in axes)
    if count > _MOST_CELLS:
        raise DiffgraftError(f"The sheet would have {count} pictures: at most {_MOST_CELLS} are drawn.")
    x, y, z = (*axes, *[Axis("", ("",))] * (3 - len(axes)))
    cells = {
        at: _cell(session, start, list(zip((x, y, z), at, strict=True))) for at in product(x.values, y.values, z.values)
    }
    drawn = {}
    with phase("drawing a sheet", len(cells)) as tracker:
        for at, cell in cells.items():
            with session.restored():
                for name, block, strength in cell.adapters:
                    _change(session, name, block, strength)
                (drawn[at],) = session.draw(cell.prompt, [cell.seed], cell.settings, image)
            tracker.advance()
    sheets = [
        labelled([[drawn[a, b, c] for a in x.values] for b in y.values], _labels(x), _labels(y), _label(z, c))
        for c in z.values
    ]
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _cell(session: Session, start: Cell, at: Sequence[tuple[Axis, str]]) -> Cell:
    """Return the cell for one value of each axis."""
    cell = start
    for axis, value in at:
        if axis.name:
            cell = _set(session, cell, axis, value)
    return cell


def _set(session: Session, cell: Cell, axis: Axis, value: str) -> Cell:
    """Return a cell with the value of one axis."""
    name, _, block = axis.name.partition(":")
    if axis.name == "seed":
        return replace(cell, seed=checked_seeds([_number(axis.name, value, int)])[0])
    if axis.name == "prompt":
        searched = axis.values[0]
        if searched not in cell.prompt:
            raise DiffgraftError(
                f"The prompt has no {searched!r}, which the axis prompt searches: it is {cell.prompt!r}."
            )
        return replace(cell, prompt=cell.prompt.replace(searched, value))
    if axis.name == "adapter":
        session.library.find(value)
        return replace(cell, adapters=(*cell.adapters, (value, "use", "1")))
    if name in session.adapters:
        if block and block not in BLOCKS:
            raise DiffgraftError(f"The axis {axis.name} names no block: {did_you_mean(block, BLOCKS)}")
        _number(axis.name, value, float)
        return replace(cell, adapters=(*cell.adapters, (name, block, value)))
    return replace(cell, settings=_with(session, cell.settings, axis.name, value))


def _with(session: Session, settings: DrawSettings, name: str, value: str) -> DrawSettings:
    """Return settings with the value of one of them."""
    group, _, key = _SHORT.get(name, name).rpartition(".")
    kind = _NESTED.get(group, DrawSettings) if group else DrawSettings
    hints = _KINDS[kind]
    if key not in hints or key in _NO_AXES or (group and group not in _NESTED):
        known = ["seed", "prompt", "adapter", *session.adapters, *_PLAIN, *_SHORT]
        known += [f"hires.{item.name}" for item in fields(Hires)]
        raise DiffgraftError(f"Unknown axis {name!r}: {did_you_mean(name, known)}")
    held = (getattr(settings, group) or kind()) if group else settings
    changed: Any = replace(held, **{key: _as(name, value, hints[key])})
    return replace(settings, **{group: changed}) if group else changed


def _as(name: str, value: str, hint: Any) -> Any:
    """Return a value as the type of its field."""
    kinds = get_args(hint) or (hint,)
    if value.lower() == "none" and type(None) in kinds:
        return None
    if name == "size":
        width, _, height = value.partition("x")
        return (_number(name, width, int), _number(name, height or width, int))
    if bool in kinds:
        if value.lower() not in _BOOLEANS:
            raise DiffgraftError(f"The axis {name} has the value {value!r}, which is neither true nor false.")
        return _BOOLEANS[value.lower()]
    for kind in (int, float):
        if kind in kinds:
            return _number(name, value, kind)
    return value


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise DiffgraftError(f"The axis {name} has the value {value!r}, which is not {what}.") from None


def _spread(name: str, word: str) -> Iterator[str]:
    """Yield the values of a word: of a range such as ``1-9 (+2)`` or ``0-1 [5]``, the files of a pattern, or it."""
    if name.strip() == "adapter" and any(sign in word for sign in "*?["):
        folder = Path(word).expanduser()
        found = sorted(map(str, folder.parent.glob(folder.name)))
        if not found:
            raise DiffgraftError(f"There is no file {word}.")
        yield from found
        return
    read = _RANGE.match(word)
    if read is None:
        if word:
            yield word
        return
    first, last, step, count = float(read[1]), float(read[2]), read[3], read[4]
    size = abs(float(step)) if step else 1.0
    number = int(count) if count else (int(abs(last - first) / size + 1e-9) + 1 if size else _MOST_VALUES + 1)
    if not 1 <= number <= _MOST_VALUES:
        raise DiffgraftError(f"The range {word!r} of the axis {name} must have 1 to {_MOST_VALUES} values.")
    width = (last - first) / (number - 1) if count and number > 1 else size if last >= first else -size
    yield from (f"{round(first + place * width, 10):g}" for place in range(number))


def _change(session: Session, name: str, block: str, strength: str) -> None:
    """Change the strength of an adapter or of one of its blocks, or use another one."""
    if block == "use":
        session.use(name)
        return
    item = session.adapters[name]
    held = strengths_of(name, item.strength)
    parts = dict(held.parts) if block else dict.fromkeys(held.parts, float(strength))
    blocks = {**held.blocks, block: float(strength)} if block else held.blocks
    session.use(item.source or item.adapter, {**parts, **blocks}, name)


def _labels(axis: Axis) -> list[str]:
    return [_label(axis, value) for value in axis.values]


def _label(axis: Axis, value: str) -> str:
    shown = usual_name(value) if axis.name == "adapter" else value
    return f"{axis.name}: {shown}" if axis.name else ""


def labelled(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str], title: str = ""
) -> Image.Image:
    """Lay out rows of pictures with a label over each column and before each row; long labels are cut.

    Pictures smaller than 128 pixels are enlarged by a whole factor, without smoothing; those of another shape than the
    largest keep it, on white.
    """
    pictures = [picture for row in rows for picture in row]
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    zoom = max(1, -(-128 // width))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(13)
    left = min(240, max(int(font.getlength(name)) for name in names) + 2 * _GAP) if any(names) else _GAP
    top = _LINE * (bool(title) + any(map(bool, columns))) + _GAP
    size = (left + len(rows[0]) * (width + _GAP), top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_GAP, 3), _cut(title, size[0] - _GAP, font), (20, 20, 20), font)
    for place, label in enumerate(columns):
        text = _cut(label, width, font)
        pen.text((left + place * (width + _GAP), top - _LINE), text, (70, 70, 70), font)
    for line, (name, row) in enumerate(zip(names, rows, strict=True)):
        down = top + line * (height + _GAP)
        pen.text((_GAP, down + height // 2 - 8), _cut(name, left - _GAP, font), (70, 70, 70), font)
        for place, picture in enumerate(row):
            resampling = Image.Resampling.NEAREST if picture.width * zoom == width else Image.Resampling.LANCZOS
            fitted = ImageOps.pad(picture.convert("RGB"), (width, height), resampling, "white")
            sheet.paste(fitted, (left + place * (width + _GAP), down))
    return sheet


def _cut(text: str, width: int, font: Any) -> str:
    """Return a text that is at most `width` pixels wide, with … where it was cut."""
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # no letter is narrower than a pixel
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
