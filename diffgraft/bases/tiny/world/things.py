"""The things of the tiny world: cut-out sprites that can be recoloured.

The sprites are glyphs of Noto Color Emoji (SIL Open Font License 1.1), stored in one atlas picture beside this file
so that drawing needs no font. ``python -m diffgraft.bases.tiny.world.things FONT.ttf`` draws the atlas again.
"""

import colorsys
import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128
"""Side of one sprite in the atlas, in pixels."""

ATLAS = Path(__file__).with_name("sprites.png")
"""Path of the atlas: one row of sprites, each `CELL` × `CELL`."""

THINGS: dict[str, str] = {
    "dog": "🐕🦮",
    "cat": "🐈",
    "fox": "🦊",
    "rabbit": "🐇",
    "bird": "🐦",
    "penguin": "🐧",
    "fish": "🐟",
    "turtle": "🐢",
    "butterfly": "🦋",
    "robot": "🤖",
    "car": "🚗🚙",
    "boat": "⛵",
    "rocket": "🚀",
    "house": "🏠",
    "tree": "🌳🌲",
    "flower": "🌷🌻",
    "mushroom": "🍄",
    "backpack": "🎒",
    "teapot": "🫖",
    "vase": "🏺",
    "cup": "☕",
    "clock": "⏰",
    "hat": "🎩",
    "chair": "🪑",
}
"""Thing → glyphs that show it, several if the thing has several shapes."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.98, 0.85, 0.15),
    "green": (0.18, 0.66, 0.25),
    "blue": (0.16, 0.38, 0.88),
    "purple": (0.55, 0.22, 0.75),
    "pink": (0.98, 0.52, 0.72),
    "brown": (0.50, 0.30, 0.16),
    "white": (0.93, 0.93, 0.95),
    "black": (0.16, 0.16, 0.19),
}
"""Colour name → RGB in 0..1, used as the mid-tone of a thing in that colour."""

KEPT_BACK = "🐩👽"
"""Glyphs in the atlas that appear in no picture of the world; they serve as subjects the base has never seen."""

_GLYPHS = "".join(THINGS.values()) + KEPT_BACK


@functools.cache
def _atlas() -> np.ndarray:
    with Image.open(ATLAS) as picture:
        return np.asarray(picture.convert("RGBA"))


@functools.cache
def sprite(glyph: str, colour: str | None = None) -> Image.Image:
    """Return a glyph's cut-out, RGBA, `CELL` × `CELL`, in its original colours or in `colour`, a key of `COLOURS`."""
    column = _GLYPHS.index(glyph)
    pixels = _atlas()[:, column * CELL : (column + 1) * CELL]
    if colour is not None:
        pixels = recolour(pixels, COLOURS[colour])
    return Image.fromarray(pixels)


def recolour(rgba: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Return a cut-out, uint8 [h, w, 4], in one colour (RGB in 0..1), with its light and shade preserved.

    Tones run from black through the colour to white, with the colour at the cut-out's median brightness, so that
    a grey robot and a red car both become clearly blue. Near-black details (eyes, noses, tyres) do not change.
    """
    rgb = rgba[..., :3].astype(np.float64) / 255
    solid = rgba[..., 3] > 128
    light = rgb @ np.array([0.30, 0.59, 0.11])
    middle = float(np.clip(np.median(light[solid]), 0.25, 0.75))
    shade = np.clip(light / middle, 0, 1)[..., None]
    glow = np.clip((light - middle) / (1 - middle), 0, 1)[..., None]
    tone = np.asarray(colour)
    painted = tone * (0.25 + 0.75 * shade) * (1 - 0.6 * glow) + 0.6 * glow
    dark = np.clip(1 - light / 0.22, 0, 1)[..., None]
    mixed = painted * (1 - dark) + rgb * dark
    if colorsys.rgb_to_hsv(*colour)[1] < 0.3:  # white and black things keep a trace of their original tones
        mixed = 0.85 * mixed + 0.15 * rgb
    out = rgba.copy()
    out[..., :3] = np.clip(mixed * 255 + 0.5, 0, 255).astype(np.uint8)
    return out


def cut_glyph(font: str, glyph: str) -> Image.Image:
    """Return a glyph of the Noto Color Emoji font file at `font`, RGBA, centred in a square of `CELL` pixels."""
    face = ImageFont.truetype(font, 109)  # the only size of the font's bitmaps
    large = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(large).text((20, 20), glyph, font=face, embedded_color=True)
    cut = large.crop(large.getbbox())
    scale = (CELL - 4) / max(cut.size)
    cut = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(cut, ((CELL - cut.width) // 2, (CELL - cut.height) // 2))
    return cell


def draw_atlas(font: str) -> Image.Image:
    """Draw the atlas of all sprites; `font` is the path of the Noto Color Emoji font file."""
    sheet = Image.new("RGBA", (CELL * len(_GLYPHS), CELL))
    for column, glyph in enumerate(_GLYPHS):
        sheet.paste(cut_glyph(font, glyph), (column * CELL, 0))
    return sheet


if __name__ == "__main__":
    draw_atlas(sys.argv[1]).save(ATLAS, optimize=True)
