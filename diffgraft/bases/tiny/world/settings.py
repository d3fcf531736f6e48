"""The settings (backgrounds) of the tiny world, each drawn by a function on a canvas of twice the final size."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from diffgraft.bases.tiny.world.things import COLOURS

SIDE = 128
"""Side of the canvas in pixels, twice the side of a finished picture."""

RGB = tuple[int, int, int]
Rng = np.random.Generator
_NAMED = [name for name in COLOURS if name not in ("black", "white", "brown")]


def _jitter(colour: RGB, rng: Rng, amount: int = 14) -> RGB:
    """Return the colour with each channel changed at random by at most `amount`."""
    r, g, b = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in colour)
    return r, g, b


def _gradient(top: RGB, bottom: RGB) -> Image.Image:
    """Return a canvas with a vertical gradient from `top` to `bottom`."""
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (SIDE, SIDE, 3)).astype(np.uint8))


def _hill(canvas: Image.Image, height: float, colour: RGB, rng: Rng, swing: float = 6) -> None:
    """Fill the canvas below a wavy line at `height`, a fraction of the side, measured from the top."""
    x = np.arange(-2, SIDE + 3, 3)
    phase, length = rng.uniform(0, 6.28), rng.uniform(40, 110)
    y = height * SIDE + swing * np.sin(x / length * 6.28 + phase) + swing / 3 * np.sin(x / 17 + 2 * phase)
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    ImageDraw.Draw(canvas).polygon([*points, (SIDE + 2, SIDE + 2), (-2, SIDE + 2)], fill=colour)


def _disc(canvas: Image.Image, x: float, y: float, radius: float, colour: RGB) -> None:
    ImageDraw.Draw(canvas).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _cloud(canvas: Image.Image, x: float, y: float, size: float, colour: RGB = (255, 255, 255)) -> None:
    for dx, dy, r in ((-1, 0.1, 0.6), (0, -0.2, 0.8), (0.9, 0.1, 0.6)):
        _disc(canvas, x + dx * size, y + dy * size, r * size, colour)


def _fir(canvas: Image.Image, x: float, foot: float, size: float, colour: RGB) -> None:
    pen = ImageDraw.Draw(canvas)
    for tier in (0.0, 0.35, 0.7):
        top, bottom, half = foot - size * (1.5 - tier), foot - size * (0.7 - tier), size * (0.25 + 0.35 * tier)
        pen.polygon([(x, top), (x - half, bottom), (x + half, bottom)], fill=colour)


def snow(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((150, 185, 220), rng), _jitter((215, 228, 240), rng))
    horizon = rng.uniform(0.45, 0.6)
    for _ in range(3):
        _fir(canvas, rng.uniform(0, SIDE), horizon * SIDE + 6, rng.uniform(14, 24), _jitter((95, 135, 140), rng))
    _hill(canvas, horizon, (236, 242, 249), rng)
    _hill(canvas, horizon + 0.2, (250, 252, 255), rng)
    for _ in range(45):
        _disc(canvas, rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(1, 2.4), (255, 255, 255))
    return canvas


def beach(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((95, 185, 245), rng), (190, 230, 250))
    _disc(canvas, rng.uniform(10, SIDE - 10), rng.uniform(8, 24), 10, (255, 240, 150))
    sea = rng.uniform(0.35, 0.45)
    ImageDraw.Draw(canvas).rectangle((0, sea * SIDE, SIDE, SIDE), fill=_jitter((25, 130, 190), rng))
    for _ in range(7):
        x, y = rng.uniform(0, SIDE), rng.uniform(sea + 0.03, sea + 0.15) * SIDE
        ImageDraw.Draw(canvas).line((x, y, x + 14, y), fill=(120, 200, 230), width=2)
    shore = rng.uniform(0.58, 0.66)
    _hill(canvas, shore - 0.03, (240, 250, 252), rng, 3)
    _hill(canvas, shore, _jitter((240, 212, 150), rng, 8), rng, 3)
    return canvas


def meadow(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((120, 195, 250), rng), (210, 238, 255))
    _cloud(canvas, rng.uniform(10, SIDE - 10), rng.uniform(12, 26), rng.uniform(8, 13))
    horizon = rng.uniform(0.4, 0.55)
    _hill(canvas, horizon, _jitter((130, 200, 90), rng), rng)
    _hill(canvas, horizon + 0.14, _jitter((95, 180, 65), rng), rng)
    for _ in range(26):
        x, y = rng.uniform(0, SIDE), rng.uniform(horizon + 0.18, 1) * SIDE
        ImageDraw.Draw(canvas).line((x, y, x + rng.uniform(-2, 2), y - 6), fill=(60, 140, 45), width=2)
    return canvas


def night(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((8, 12, 42), rng, 6), _jitter((35, 42, 95), rng))
    for _ in range(28):
        _disc(canvas, rng.uniform(0, SIDE), rng.uniform(0, SIDE * 0.7), rng.uniform(0.6, 1.7), (255, 250, 220))
    x, y = rng.uniform(14, SIDE - 14), rng.uniform(14, 30)
    _disc(canvas, x, y, 11, (250, 240, 200))
    _disc(canvas, x + 5, y - 3, 9, (16, 20, 55))
    _hill(canvas, rng.uniform(0.62, 0.75), _jitter((18, 28, 48), rng, 6), rng)
    return canvas


def jungle(rng: Rng) -> Image.Image:
    canvas = _gradient((30, 85, 45), (15, 55, 30))
    pen = ImageDraw.Draw(canvas)
    for _ in range(34):
        x, y = rng.uniform(-8, SIDE + 8, 2)
        length, width, angle = rng.uniform(22, 40), rng.uniform(5, 9), rng.uniform(0, 6.28)
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        middle = np.array([x, y])
        points = [middle - along * length / 2, middle + across * width, middle + along * length / 2]
        points.append(middle - across * width)
        shade = int(rng.integers(0, 70))
        pen.polygon([(float(a), float(b)) for a, b in points], fill=(20 + shade // 2, 80 + shade, 35 + shade // 2))
    return canvas


def desert(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((250, 190, 110), rng), _jitter((255, 230, 180), rng))
    _disc(canvas, rng.uniform(12, SIDE - 12), rng.uniform(14, 28), 12, (255, 250, 225))
    horizon = rng.uniform(0.45, 0.58)
    _hill(canvas, horizon, _jitter((225, 150, 80), rng), rng, 10)
    _hill(canvas, horizon + 0.15, _jitter((205, 125, 60), rng), rng, 9)
    _hill(canvas, horizon + 0.33, _jitter((185, 105, 50), rng), rng, 7)
    return canvas


def city(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((170, 190, 210), rng), (225, 230, 235))
    pen = ImageDraw.Draw(canvas)
    x = -4.0
    while x < SIDE:
        width, top = rng.uniform(18, 30), rng.uniform(12, 56)
        pen.rectangle((x, top, x + width, SIDE), fill=_jitter((110, 115, 130), rng, 24))
        for wx in np.arange(x + 4, x + width - 4, 7):
            for wy in np.arange(top + 5, 84, 9):
                pen.rectangle((wx, wy, wx + 3, wy + 4), fill=(250, 230, 150) if rng.random() < 0.5 else (70, 80, 100))
        x += width
    road = rng.uniform(0.7, 0.76) * SIDE
    pen.rectangle((0, road, SIDE, SIDE), fill=_jitter((75, 75, 82), rng, 8))
    pen.rectangle((0, road - 5, SIDE, road), fill=(185, 185, 185))
    for dash in np.arange(rng.uniform(-16, 0), SIDE, 26):
        pen.rectangle((dash, road + 16, dash + 13, road + 19), fill=(240, 240, 240))
    return canvas


def underwater(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((60, 185, 215), rng), _jitter((10, 70, 130), rng))
    pen = ImageDraw.Draw(canvas)
    for _ in range(6):
        x, height = rng.uniform(0, SIDE), rng.uniform(25, 60)
        y = np.arange(SIDE, SIDE - height, -3)
        weed = [(float(x + 4 * np.sin(v / 7 + x)), float(v)) for v in y]
        pen.line(weed, fill=_jitter((20, 130, 90), rng), width=5)
    for _ in range(14):
        x, y = rng.uniform(0, SIDE, 2)
        r = rng.uniform(2, 5)
        pen.ellipse((x - r, y - r, x + r, y + r), outline=(210, 245, 255), width=2)
    return canvas


def sunset(rng: Rng) -> Image.Image:
    canvas = _gradient(_jitter((110, 50, 130), rng), _jitter((255, 150, 70), rng))
    horizon = rng.uniform(0.62, 0.72)
    _disc(canvas, rng.uniform(24, SIDE - 24), horizon * SIDE - rng.uniform(2, 14), 22, (255, 225, 110))
    for _ in range(3):
        x, y = rng.uniform(0, SIDE), rng.uniform(8, 50)
        ImageDraw.Draw(canvas).rounded_rectangle((x - 22, y, x + 22, y + 5), 3, fill=(235, 110, 110))
    _hill(canvas, horizon, _jitter((70, 30, 75), rng), rng, 4)
    return canvas


def kitchen(rng: Rng) -> Image.Image:
    wall = _jitter((225, 232, 228), rng)
    canvas = Image.new("RGB", (SIDE, SIDE), wall)
    pen = ImageDraw.Draw(canvas)
    seam, step = (170, 190, 190), 20
    for line in np.arange(rng.uniform(-step, 0), SIDE, step):
        pen.line((line, 0, line, SIDE), fill=seam, width=2)
        pen.line((0, line, SIDE, line), fill=seam, width=2)
    table = rng.uniform(0.6, 0.7) * SIDE
    wood = _jitter((176, 118, 66), rng)
    pen.rectangle((0, table, SIDE, SIDE), fill=wood)
    for y in np.arange(table + 5, SIDE, 9):
        pen.line((0, y, SIDE, y + rng.uniform(-3, 3)), fill=(140, 88, 45), width=2)
    return canvas


def plain(rng: Rng, colour: str) -> Image.Image:
    soft = tuple(int(255 * (0.45 * c + 0.55)) for c in COLOURS[colour])
    return Image.new("RGB", (SIDE, SIDE), _jitter((soft[0], soft[1], soft[2]), rng, 8))


def _two_tones(rng: Rng) -> tuple[RGB, RGB]:
    """Return a pale background colour and a stronger pattern colour of another hue."""
    first, second = (COLOURS[_NAMED[i]] for i in rng.choice(len(_NAMED), 2, replace=False))
    pale = [int(255 * (0.25 * c + 0.75)) for c in first]
    soft = [int(255 * (0.6 * c + 0.4)) for c in second]
    return (pale[0], pale[1], pale[2]), (soft[0], soft[1], soft[2])


def striped(rng: Rng) -> Image.Image:
    ground, figure = _two_tones(rng)
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    step = 24
    for x in np.arange(rng.uniform(-step, 0), SIDE, step):
        ImageDraw.Draw(canvas).rectangle((x, 0, x + step / 2, SIDE), fill=figure)
    return canvas


def dotted(rng: Rng) -> Image.Image:
    ground, figure = _two_tones(rng)
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    step, start = 26, rng.uniform(-13, 0, 2)
    for row, y in enumerate(np.arange(start[1], SIDE + 8, step)):
        for x in np.arange(start[0] - step / 2 * (row % 2), SIDE + 8, step):
            _disc(canvas, x, y, 7, figure)
    return canvas


PLACES: dict[str, Callable[[Rng], Image.Image]] = {
    "snow": snow,
    "beach": beach,
    "grass": meadow,
    "night": night,
    "jungle": jungle,
    "desert": desert,
    "city": city,
    "water": underwater,
    "sunset": sunset,
    "kitchen": kitchen,
    "striped": striped,
    "dotted": dotted,
}
"""Setting → function that draws it; `plain` is not included because it also needs a colour."""

SETTINGS = (*PLACES, "plain")
"""Names of all settings of the tiny world."""


def draw_setting(setting: str, rng: Rng, colour: str | None = None) -> Image.Image:
    """Draw the background of a scene, RGB, `SIDE` × `SIDE`; only the setting "plain" uses `colour`."""
    if setting == "plain":
        return plain(rng, colour or "white")
    return PLACES[setting](rng)
