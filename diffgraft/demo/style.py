"""A style that the embedded base does not know: ``python -m diffgraft.demo.style`` draws its pictures again.

It is a screen print: four flat inks by brightness, the darkest of them printed twice, a little apart. Twelve
captioned pictures are for learning, eight of other things and settings for measuring what was learnt.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from diffgraft.bases.tiny.world import Scene
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, paste, random_scene
from diffgraft.bases.tiny.world.settings import draw_setting
from diffgraft.bases.tiny.world.styles import FINAL
from diffgraft.bases.tiny.world.things import THINGS, sprite

INKS = ((38, 18, 84), (214, 38, 104), (255, 150, 66), (255, 240, 205))
"""Dark to bright"""
BOUNDS = (0.36, 0.60, 0.82)
"""Brightness, 0 to 1, at which one ink follows another"""
SHIFT = 3
"""How far right and down the darkest ink lands once more, in pixels of the canvas, which is twice as wide"""


def screen_print(canvas: Image.Image) -> Image.Image:
    """An RGB canvas as a print of 64 × 64."""
    smooth = canvas.filter(ImageFilter.MedianFilter(5))
    light = np.asarray(smooth, np.float32) @ np.array([0.30, 0.59, 0.11], np.float32) / 255
    printed = np.asarray(INKS, np.uint8)[np.digitize(light, BOUNDS)]
    printed[SHIFT:, SHIFT:][light[:-SHIFT, :-SHIFT] < BOUNDS[0]] = INKS[0]
    return Image.fromarray(printed).resize((FINAL, FINAL), Image.Resampling.BOX)


@dataclass(frozen=True)
class Style:
    """A hand that draws any scene."""

    name: str
    learn: tuple[tuple[str, str], ...]
    """Thing and setting of each picture to learn from"""
    held_out: tuple[tuple[str, str], ...]
    """The same of those that are left out"""
    seed: int

    @property
    def folder(self) -> Path:
        """Holds ``learn/`` and ``held-out/``, with a caption beside each picture."""
        return Path(__file__).with_name("pictures") / self.name

    def draw(self, scene: Scene) -> Image.Image:
        """The scene, printed."""
        canvas = draw_setting(scene.setting, np.random.default_rng(scene.seed), scene.backdrop)
        paste(canvas, sprite(scene.glyph or THINGS[scene.thing][0], scene.colour), scene)
        return screen_print(canvas)

    def scene(self, thing: str, setting: str, number: int) -> Scene:
        """The `number`-th scene of a thing in a setting, in the thing's own colours."""
        rng = np.random.default_rng([self.seed, number])
        return replace(random_scene(rng, thing=thing, setting=setting), colour=None, style="flat")


def words(thing: str, setting: str) -> str:
    """What such a picture shows."""
    return f"a {thing} {SETTING_WORDS[setting][0]}"


SCREEN_PRINT = Style(
    "screen-print",
    learn=(
        ("dog", "grass"),
        ("house", "snow"),
        ("car", "city"),
        ("teapot", "kitchen"),
        ("boat", "sunset"),
        ("penguin", "snow"),
        ("tree", "desert"),
        ("robot", "night"),
        ("fish", "water"),
        ("flower", "jungle"),
        ("cup", "striped"),
        ("rabbit", "beach"),
    ),
    held_out=(
        ("cat", "grass"),
        ("turtle", "beach"),
        ("rocket", "night"),
        ("backpack", "city"),
        ("mushroom", "jungle"),
        ("clock", "kitchen"),
        ("fox", "snow"),
        ("chair", "sunset"),
    ),
    seed=31,
)


def write_pictures(style: Style, folder: Path | None = None) -> None:
    """Draw both splits into `folder`, each picture with its caption in a ``.txt`` beside it."""
    folder = folder or style.folder
    for split, shown in (("learn", style.learn), ("held-out", style.held_out)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, (thing, setting) in enumerate(shown, 1):
            picture = style.draw(style.scene(thing, setting, number + (split == "held-out") * 100))
            picture.save(folder / split / f"{number:02d}.png", optimize=True)
            (folder / split / f"{number:02d}.txt").write_text(words(thing, setting) + "\n", "utf-8")


if __name__ == "__main__":
    write_pictures(SCREEN_PRINT)
