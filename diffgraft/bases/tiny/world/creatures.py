"""Unlimited made-up subjects, each determined by its number: bodies with limbs, eyes and patterns, or warped sprites.

Their captions use a rare word and a class noun ("a zorb toy"), so that the base has seen rare words with many meanings
before an adapter assigns a new meaning to one of them.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from diffgraft.bases.tiny.world.glyphs import glyph_names, glyph_sprite
from diffgraft.bases.tiny.world.things import CELL, THINGS, recolour, sprite

NOUNS = ("toy", "creature", "monster", "animal", "thing")
"""Class nouns of subjects built from bodies and limbs; a warped sprite keeps the noun of its original."""

Rng = np.random.Generator
RGB = tuple[int, int, int]
_LARGE = 2 * CELL
"""Side of the drawing before it is scaled down, in pixels."""


def creature(number: int) -> tuple[str, Image.Image]:
    """Return the class noun and the cut-out (RGBA, `CELL` × `CELL`) of made-up subject `number`."""
    rng = np.random.default_rng([77, number])
    if rng.random() < 0.4:
        noun, cutout = _bent_sprite(rng)
    else:
        noun, cutout = str(rng.choice(NOUNS)), _built(rng)
    return noun, _filling(cutout)


def noun_of(number: int) -> str:
    """Return the class noun of made-up subject `number` without drawing the subject."""
    rng = np.random.default_rng([77, number])
    return _which_sprite(rng)[0] if rng.random() < 0.4 else str(rng.choice(NOUNS))


def _colour(rng: Rng) -> RGB:
    """Return a random colour of any hue, usually saturated and sometimes greyish."""
    hue, value = rng.uniform(0, 6), rng.uniform(0.35, 1)
    saturation = rng.uniform(0.45, 1) if rng.random() < 0.85 else rng.uniform(0, 0.25)
    channels = [np.clip(abs((hue + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)]
    r, g, b = (int(255 * value * (1 - saturation * (1 - channel))) for channel in channels)
    return r, g, b


def _which_sprite(rng: Rng) -> tuple[str, str]:
    """Return a random noun and glyph: a thing of the tiny world half of the time, otherwise any named glyph."""
    if rng.random() < 0.5:
        noun = str(rng.choice(list(THINGS)))
        return noun, str(rng.choice(list(THINGS[noun])))
    names = glyph_names()
    noun = list(names)[int(rng.integers(len(names)))]
    return noun, names[noun][0]


def _bent_sprite(rng: Rng) -> tuple[str, Image.Image]:
    """Return the noun and cut-out of a random sprite, smoothly warped, and usually recoloured or patterned."""
    noun, glyph = _which_sprite(rng)
    pixels = np.asarray(sprite(glyph) if noun in THINGS else glyph_sprite(glyph))
    if rng.random() < 0.75:
        r, g, b = _colour(rng)
        pixels = recolour(pixels, (r / 255, g / 255, b / 255))
    cutout = _bent(Image.fromarray(pixels), rng)
    if rng.random() < 0.6:
        cutout = _patterned(cutout, rng)
    return noun, cutout


def _bent(cutout: Image.Image, rng: Rng) -> Image.Image:
    """Warp the cut-out by randomly moved points of a 4 × 4 grid, and stretch it along one axis."""
    side, cells = cutout.width, 3
    ticks = np.linspace(0, side, cells + 1)
    stretch = np.exp(rng.uniform(-0.35, 0.35))
    moved = np.stack(np.meshgrid(ticks, ticks), -1) + rng.normal(0, 0.07 * side, (cells + 1, cells + 1, 2))
    moved = (moved - side / 2) * (max(1, stretch), max(1, 1 / stretch)) + side / 2
    mesh = []
    for row in range(cells):
        for column in range(cells):
            corners = [moved[row, column], moved[row + 1, column], moved[row + 1, column + 1], moved[row, column + 1]]
            box = (int(ticks[column]), int(ticks[row]), int(ticks[column + 1]), int(ticks[row + 1]))
            mesh.append((box, tuple(float(v) for corner in corners for v in corner)))
    margin = Image.new("RGBA", cutout.size)
    margin.paste(cutout.resize((side * 3 // 4, side * 3 // 4), Image.Resampling.BICUBIC), (side // 8, side // 8))
    return margin.transform(cutout.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def _outline(rng: Rng, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a random shape around (x, y): a polygon, a star, an ellipse or a soft blob."""
    kind, turn = rng.integers(4), rng.uniform(0, 2 * np.pi)
    if kind == 0:
        corners = int(rng.integers(3, 8))
        angles, radii = np.linspace(0, 2 * np.pi, corners, endpoint=False), rng.uniform(0.75, 1.15, corners)
    elif kind == 1:
        points = int(rng.integers(4, 9))
        angles = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False)
        radii = np.where(np.arange(2 * points) % 2, rng.uniform(0.45, 0.85), 1.1)
    else:
        angles, radii = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48)
        if kind == 3:
            for wave in (2, 3, 4):
                radii = radii + rng.uniform(-0.22, 0.22) * np.cos(wave * angles + rng.uniform(0, 6.28))
    wide = np.exp(rng.uniform(-0.4, 0.4))
    across, up = radius * wide * radii * np.cos(angles), radius / wide * radii * np.sin(angles)
    a, b = np.cos(turn), np.sin(turn)
    return [(float(x + a * u - b * v), float(y + b * u + a * v)) for u, v in zip(across, up, strict=True)]


def _limb(pen: ImageDraw.ImageDraw, rng: Rng, x: float, y: float, angle: float, length: float, colour: RGB) -> None:
    """Draw a curved, tapering limb that starts at (x, y), sometimes with a foot."""
    thick, thin, bend = rng.uniform(9, 20), rng.uniform(5, 12), rng.uniform(-1.3, 1.3)
    for share in np.linspace(0, 1, 24):
        radius = thick + (thin - thick) * share
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        x += length / 24 * np.cos(angle + bend * share)
        y += length / 24 * np.sin(angle + bend * share)
    if rng.random() < 0.4:
        radius = thin * rng.uniform(1.3, 2)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))


def _built(rng: Rng) -> Image.Image:
    """Draw a body with random limbs, and often a head, a pattern and eyes; RGBA, `CELL` × `CELL`."""
    cutout = Image.new("RGBA", (_LARGE, _LARGE))
    pen = ImageDraw.Draw(cutout)
    x, y, radius = _LARGE / 2, _LARGE * rng.uniform(0.48, 0.58), _LARGE * rng.uniform(0.17, 0.28)
    main, second = _colour(rng), _colour(rng)
    same_colour = rng.random() < 0.5
    for _ in range(int(rng.integers(0, 3))):  # pairs of legs, arms or wings
        angle, length = rng.uniform(-1.2, 1.4), radius * rng.uniform(0.9, 1.9)
        colour = main if same_colour else second
        for side in (angle, np.pi - angle):
            _limb(pen, rng, x + 0.6 * radius * np.cos(side), y + 0.6 * radius * np.sin(side), side, length, colour)
    for _ in range(int(rng.integers(0, 3))):  # a tail, a trunk, a horn
        angle = rng.uniform(0, 2 * np.pi)
        _limb(pen, rng, x, y, angle, radius * rng.uniform(1.3, 2.4), main if rng.random() < 0.6 else second)
    pen.polygon(_outline(rng, x, y, radius), fill=main)
    eyes_at, size = (x, y - 0.2 * radius), radius
    if rng.random() < 0.6:
        angle = rng.choice((-0.5, -0.75, -0.25)) * np.pi + rng.uniform(-0.2, 0.2)
        head = radius * rng.uniform(0.45, 0.75)
        eyes_at = (x + 1.1 * radius * np.cos(angle), y + 1.1 * radius * np.sin(angle))
        size = head
        pen.polygon(_outline(rng, *eyes_at, head), fill=main if rng.random() < 0.6 else second)
        if rng.random() < 0.5:
            for direction in (-2.0, -1.1):
                _limb(pen, rng, *eyes_at, direction, head * rng.uniform(1.1, 1.7), second)
    cutout = _patterned(cutout, rng) if rng.random() < 0.7 else cutout
    if rng.random() < 0.8:
        _eyes(ImageDraw.Draw(cutout), rng, *eyes_at, size)
    return cutout.resize((CELL, CELL), Image.Resampling.BOX)


def _eyes(pen: ImageDraw.ImageDraw, rng: Rng, x: float, y: float, size: float) -> None:
    """Draw one to three eyes in a row, centred at (x, y), on a head or body of radius `size`."""
    count, radius = int(rng.integers(1, 4)), size * rng.uniform(0.14, 0.28)
    for index in range(count):
        centre = x + (index - (count - 1) / 2) * 2.3 * radius
        pen.ellipse((centre - radius, y - radius, centre + radius, y + radius), fill=(255, 255, 255, 255))
        pupil = radius * 0.55
        pen.ellipse((centre - pupil, y - pupil, centre + pupil, y + pupil), fill=(20, 20, 30, 255))


def _patterned(cutout: Image.Image, rng: Rng) -> Image.Image:
    """Return the cut-out with stripes, spots, patches or its lower part in another colour, inside its outline."""
    side = cutout.width
    paint = Image.new("RGBA", cutout.size)
    pen = ImageDraw.Draw(paint)
    colour, kind = (*_colour(rng), 255), rng.integers(4)
    if kind == 0:
        step, slant = side * rng.uniform(0.1, 0.22), rng.uniform(-1, 1) * side
        for start in np.arange(-side, 2 * side, step):
            pen.line([(start, 0), (start + slant, side)], fill=colour, width=int(step * rng.uniform(0.3, 0.6)))
    elif kind == 1:
        radius = side * rng.uniform(0.025, 0.055)
        for x, y in rng.uniform(0.1, 0.9, (int(rng.integers(12, 28)), 2)) * side:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == 2:
        for x, y in rng.uniform(0.2, 0.8, (int(rng.integers(2, 6)), 2)) * side:
            pen.polygon(_outline(rng, x, y, side * rng.uniform(0.06, 0.14)), fill=colour)
    else:
        level = side * rng.uniform(0.35, 0.65)
        pen.rectangle((0, level, side, side), fill=colour)
    inside = ImageChops.multiply(paint.getchannel("A"), cutout.getchannel("A"))
    out = cutout.copy()
    out.paste(paint, (0, 0), inside)
    out.putalpha(cutout.getchannel("A"))
    return out


def _filling(cutout: Image.Image) -> Image.Image:
    """Return the cut-out, cropped and scaled so that it fills the square except for a margin of two pixels."""
    box = cutout.getchannel("A").point(lambda value: 255 * (value > 24)).getbbox()
    if box is None:
        return cutout
    part = cutout.crop(box)
    scale = (CELL - 4) / max(part.size)
    size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
    part = part.resize(size, Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (CELL, CELL))
    out.paste(part, ((CELL - part.width) // 2, (CELL - part.height) // 2))
    return out
