"""Hundreds of named glyphs of Noto Color Emoji; a name is the Unicode name, shortened to three words.

The denoiser is trained on these glyphs so that it learns many outlines. Two sets of glyphs appear in no training
picture; they serve as subjects that the base has never seen. The sprites are stored in one atlas picture beside this
file; ``python -m diffgraft.bases.tiny.world.glyphs FONT.ttf`` draws the atlas again.
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
"""Number of sprites in one row of the atlas."""


@dataclass(frozen=True)
class HeldBack:
    """A glyph that appears in no training picture of the base."""

    glyph: str
    noun: str
    """Class noun to use when an adapter learns this subject: a thing of the tiny world."""


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
"""Unseen subjects for tuning settings, demonstrations and benchmarks: subject name → glyph and class noun."""

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
"""Unseen subjects for tests and final measurements only; do not tune any setting on them."""

LOOK_ALIKES = "🐫☔🌂⛱🏍🐚🦣🎻🪕👾"
"""Glyphs excluded from training because their outlines are similar to those of held-back glyphs."""


@functools.cache
def glyph_names() -> Mapping[str, tuple[str, ...]]:
    """Return a mapping from name to glyphs, in list order.

    The 24 things of the tiny world are left out, and the glyphs that no picture of the training shows.
    """
    excluded = {*"".join(THINGS.values()), *LOOK_ALIKES, "🐩", "👽"}
    excluded |= {subject.glyph for subject in (*HELD_BACK.values(), *HELD_BACK_FOR_TESTS.values())}
    names: dict[str, tuple[str, ...]] = {}
    for glyph, name in _listed():
        if glyph not in excluded:
            names[name] = (*names.get(name, ()), glyph)
    return names


@functools.cache
def _listed() -> tuple[tuple[str, str], ...]:
    """Return (glyph, name) of every sprite in the atlas, in atlas order."""
    rows = (line.split("\t") for line in LIST.read_text("utf-8").splitlines())
    return tuple((glyph, name) for glyph, name in rows)


@functools.cache
def _atlas() -> np.ndarray:
    with Image.open(ATLAS) as picture:
        return np.asarray(picture.convert("RGBA"))


@functools.cache
def _places() -> Mapping[str, int]:
    """Return a mapping from glyph to the index of its cell in the atlas."""
    return {glyph: index for index, (glyph, _) in enumerate(_listed())}


def glyph_sprite(glyph: str) -> Image.Image:
    """Return the cut-out of a listed glyph in its original colours, RGBA, `CELL` × `CELL`."""
    row, column = divmod(_places()[glyph], COLUMNS)
    cell = _atlas()[row * STORED : (row + 1) * STORED, column * STORED : (column + 1) * STORED]
    return Image.fromarray(cell).resize((CELL, CELL), Image.Resampling.BICUBIC)


def draw_atlas(font: str) -> Image.Image:
    """Draw the atlas of all listed glyphs; `font` is the path of the Noto Color Emoji font file."""
    listed = _listed()
    sheet = Image.new("RGBA", (STORED * COLUMNS, STORED * -(-len(listed) // COLUMNS)))
    for index, (glyph, _) in enumerate(listed):
        cell = cut_glyph(font, glyph).resize((STORED, STORED), Image.Resampling.LANCZOS)
        sheet.paste(cell, (index % COLUMNS * STORED, index // COLUMNS * STORED))
    return sheet


if __name__ == "__main__":
    draw_atlas(sys.argv[1]).save(ATLAS, quality=80, alpha_quality=95, method=6)
