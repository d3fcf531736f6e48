"""Hundreds more things by name: glyphs of Noto Color Emoji, called by their Unicode names cut to three words.

The denoiser is trained on them so that it has a general notion of outlines. Two sets of glyphs appear in no training
picture: material for subjects that the base has never seen. The sprites are stored in one atlas picture beside this
file; ``python -m diffgraft.bases.tiny.world.glyphs FONT.ttf`` draws it again.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffgraft.bases.tiny.world.things import CELL, THINGS, cut_glyph

ATLAS = Path(__file__).with_name("glyphs.webp")
LIST = Path(__file__).with_name("glyphs.txt")
STORED = 96
"""Side of one sprite in the atlas, in pixels; sprites are enlarged to `CELL` when they are read."""
COLUMNS = 32


@dataclass(frozen=True)
class HeldBack:
    """A glyph that no training picture shows."""

    glyph: str
    noun: str
    """Class noun for adapters that learn it: one of the world's own things."""


HELD_BACK: Mapping[str, HeldBack] = {
    "sauropod": HeldBack("🦕", "turtle"),
    "flamingo": HeldBack("🦩", "bird"),
    "guitar": HeldBack("🎸", "chair"),
    "octopus": HeldBack("🐙", "fish"),
    "helicopter": HeldBack("🚁", "rocket"),
    "pineapple": HeldBack("🍍", "vase"),
    "dromedary": HeldBack("🐪", "dog"),
    "umbrella": HeldBack("☂", "hat"),
}
"""Subjects for choosing settings, demonstrations and benchmarks."""

HELD_BACK_FOR_TESTS: Mapping[str, HeldBack] = {
    "snail": HeldBack("🐌", "turtle"),
    "bicycle": HeldBack("🚲", "car"),
    "anchor": HeldBack("⚓", "boat"),
    "crab": HeldBack("🦀", "fish"),
    "kite": HeldBack("🪁", "butterfly"),
    "scooter": HeldBack("🛵", "car"),
    "elephant": HeldBack("🐘", "dog"),
    "owl": HeldBack("🦉", "bird"),
}
"""Subjects for tests and final measurements only: no setting may be chosen by them."""

LOOK_ALIKES = "🐫☔🌂⛱🏍🐚🦣🎻🪕👾"
"""Glyphs left out because their outlines come close to held-back ones."""


@functools.cache
def glyph_names() -> Mapping[str, tuple[str, ...]]:
    """Name → the glyphs called so, in the order of the list; without the world's own things and held-back glyphs."""
    left_out = {*"".join(THINGS.values()), *LOOK_ALIKES, "🐩", "👽"}
    left_out |= {subject.glyph for subject in (*HELD_BACK.values(), *HELD_BACK_FOR_TESTS.values())}
    names: dict[str, tuple[str, ...]] = {}
    for glyph, name in _listed():
        if glyph not in left_out:
            names[name] = (*names.get(name, ()), glyph)
    return names


@functools.cache
def _listed() -> tuple[tuple[str, str], ...]:
    """(glyph, name) of every sprite in the atlas, in its order."""
    rows = (line.split("\t") for line in LIST.read_text("utf-8").splitlines())
    return tuple((glyph, name) for glyph, name in rows)


@functools.cache
def _atlas() -> np.ndarray:
    with Image.open(ATLAS) as picture:
        return np.asarray(picture.convert("RGBA"))


@functools.cache
def _places() -> Mapping[str, int]:
    return {glyph: place for place, (glyph, _) in enumerate(_listed())}


def glyph_sprite(glyph: str) -> Image.Image:
    """The cut-out of a listed glyph in its own colours, RGBA, `CELL` × `CELL`."""
    row, column = divmod(_places()[glyph], COLUMNS)
    cell = _atlas()[row * STORED : (row + 1) * STORED, column * STORED : (column + 1) * STORED]
    return Image.fromarray(cell).resize((CELL, CELL), Image.Resampling.BICUBIC)


def draw_atlas(font: str) -> Image.Image:
    """The atlas of all listed glyphs, drawn from the file of Noto Color Emoji."""
    listed = _listed()
    sheet = Image.new("RGBA", (STORED * COLUMNS, STORED * -(-len(listed) // COLUMNS)))
    for place, (glyph, _) in enumerate(listed):
        cell = cut_glyph(font, glyph).resize((STORED, STORED), Image.Resampling.LANCZOS)
        sheet.paste(cell, (place % COLUMNS * STORED, place // COLUMNS * STORED))
    return sheet


if __name__ == "__main__":
    draw_atlas(sys.argv[1]).save(ATLAS, quality=80, alpha_quality=95, method=6)
