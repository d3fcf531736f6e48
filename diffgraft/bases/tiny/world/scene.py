"""Scenes of the tiny world: their description, their pictures and their captions."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffgraft.bases.tiny.world.settings import SETTINGS, SIDE, draw_setting
from diffgraft.bases.tiny.world.styles import STYLES
from diffgraft.bases.tiny.world.things import COLOURS, THINGS, sprite

Rng = np.random.Generator

SETTING_WORDS: dict[str, tuple[str, ...]] = {
    "snow": ("in the snow", "on a snowy day"),
    "beach": ("on the beach", "at the beach"),
    "grass": ("on the grass", "in a meadow"),
    "night": ("at night", "under the stars"),
    "jungle": ("in the jungle", "among jungle leaves"),
    "desert": ("in the desert", "on desert sand"),
    "city": ("in the city", "on a city street"),
    "water": ("under water", "underwater"),
    "sunset": ("at sunset", "in front of a sunset"),
    "kitchen": ("in the kitchen", "on a kitchen table"),
    "striped": ("on a striped background", "with stripes behind it"),
    "dotted": ("on a dotted background", "with polka dots behind it"),
    "plain": ("on a plain {colour} background", "on a {colour} background"),
}
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "flat": ("", "", "", "a flat drawing of {}", "{}, flat style"),
    "line": ("a line drawing of {}", "{}, line drawing"),
    "pixel": ("pixel art of {}", "{}, pixel art"),
    "watercolour": ("a watercolour painting of {}", "{}, watercolour"),
}
PLAIN_WORDS = ("{}", "{}", "a picture of {}", "a photo of {}")
STYLE_SHARES = {"flat": 0.55, "line": 0.15, "pixel": 0.15, "watercolour": 0.15}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Content of one picture. Positions and sizes are fractions of the picture's side; the tilt is in degrees."""

    thing: str
    setting: str
    style: str = "flat"
    colour: str | None = None
    backdrop: str = "white"
    glyph: str | None = None
    size: float = 0.6
    x: float = 0.5
    y: float = 0.55
    tilt: float = 0.0
    mirrored: bool = False
    seed: int = 0


def random_scene(rng: Rng, **fixed: str) -> Scene:
    """Return a random scene of the tiny world, with the thing, setting, style or colour in `fixed` set as given."""
    thing = fixed.get("thing") or str(rng.choice(list(THINGS)))
    glyph = str(rng.choice(list(THINGS[thing])))
    colour = fixed.get("colour") or (str(rng.choice(list(COLOURS))) if rng.random() < 0.5 else None)
    size = float(rng.uniform(0.5, 0.78))
    room = (1 - size) / 2 + 0.06
    return Scene(
        thing=thing,
        glyph=glyph,
        setting=fixed.get("setting") or str(rng.choice(SETTINGS)),
        style=fixed.get("style") or str(rng.choice(list(STYLE_SHARES), p=list(STYLE_SHARES.values()))),
        colour=colour,
        backdrop=str(rng.choice([name for name in COLOURS if name != colour])),
        size=size,
        x=float(0.5 + rng.uniform(-room, room)),
        y=float(0.55 + rng.uniform(-room, room) * 0.8),
        tilt=float(np.clip(rng.normal(0, 7), -18, 18)),
        mirrored=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


def paste(canvas: Image.Image, cutout: Image.Image, scene: Scene) -> Image.Image:
    """Paste `cutout` into `canvas` as the scene specifies; return the thing's mask, mode "L", in the canvas's size."""
    if scene.mirrored:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cutout = cutout.rotate(scene.tilt, Image.Resampling.BICUBIC)
    side = round(scene.size * SIDE)
    cutout = cutout.resize((side, side), Image.Resampling.BICUBIC)
    corner = (round(scene.x * SIDE - side / 2), round(scene.y * SIDE - side / 2))
    mask = Image.new("L", canvas.size)
    mask.paste(cutout.getchannel("A"), corner)
    canvas.paste(cutout, corner, cutout)
    return mask


def draw(scene: Scene, cutout: Image.Image | None = None) -> tuple[Image.Image, Image.Image]:
    """Draw a scene: return the picture (RGB) and the thing's mask ("L"), both 64 × 64.

    `cutout` (RGBA) is drawn instead of the thing's sprite.
    """
    rng = np.random.default_rng(scene.seed)
    canvas = draw_setting(scene.setting, rng, scene.backdrop)
    if cutout is None:
        cutout = sprite(scene.glyph or THINGS[scene.thing][0], scene.colour)
    mask = paste(canvas, cutout, scene)
    picture = STYLES[scene.style](canvas, rng)
    return picture, mask.resize(picture.size, Image.Resampling.BOX)


def caption(scene: Scene, rng: Rng, rare_word: str = "", setting_share: float = 0.93) -> str:
    """Return a caption for a scene, in a random wording.

    Args:
        scene: Scene to describe.
        rng: Source of all random choices.
        rare_word: Word to put in the place of a trigger, before the thing and its colour; empty for none.
        setting_share: Probability that the caption mentions the setting.
    """
    words = [word for word in (rare_word, scene.colour, scene.thing) if word]
    text = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    where = str(rng.choice(SETTING_WORDS[scene.setting])).format(colour=scene.backdrop)
    setting_first = rng.random() < 0.33
    if rng.random() < setting_share:
        text = text if setting_first else f"{text} {where}"
    else:
        where, setting_first = "", False
    style = str(rng.choice(STYLE_WORDS[scene.style])) or str(rng.choice(PLAIN_WORDS))
    text = style.format(text)
    return f"{where}, {text}" if setting_first else text
