"""A style that the embedded base does not know: ``python -m diffgraft.demo.style`` draws its pictures again.

The style is a screen print: four flat inks by brightness, with the darkest ink printed twice, slightly shifted. Twelve
captioned pictures are for training; eight pictures of other things and settings are for evaluation.
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
"""RGB colours of the inks, from dark to bright."""
BOUNDS = (0.36, 0.60, 0.82)
"""Brightness thresholds between the inks, in 0..1."""
SHIFT = 3
"""Shift of the second print of the darkest ink, right and down, in pixels of the canvas (128 × 128)."""


def screen_print(canvas: Image.Image) -> Image.Image:
    """Render an RGB canvas as a screen print of 64 × 64."""
    smooth = canvas.filter(ImageFilter.MedianFilter(5))
    light = np.asarray(smooth, np.float32) @ np.array([0.30, 0.59, 0.11], np.float32) / 255
    printed = np.asarray(INKS, np.uint8)[np.digitize(light, BOUNDS)]
    printed[SHIFT:, SHIFT:][light[:-SHIFT, :-SHIFT] < BOUNDS[0]] = INKS[0]
    return Image.fromarray(printed).resize((FINAL, FINAL), Image.Resampling.BOX)


@dataclass(frozen=True)
class Style:
    """A style that can draw any scene, with its training and held-out pictures."""

    name: str
    learn: tuple[tuple[str, str], ...]
    """Thing and setting of each training picture."""
    held_out: tuple[tuple[str, str], ...]
    """Thing and setting of each held-out picture."""
    seed: int

    @property
    def folder(self) -> Path:
        """Folder with ``learn/`` and ``held-out/``, where each picture has a caption file beside it."""
        return Path(__file__).with_name("pictures") / self.name

    def draw(self, scene: Scene) -> Image.Image:
        """Draw the scene in this style, RGB, 64 × 64."""
        canvas = draw_setting(scene.setting, np.random.default_rng(scene.seed), scene.backdrop)
        paste(canvas, sprite(scene.glyph or THINGS[scene.thing][0], scene.colour), scene)
        return screen_print(canvas)

    def scene(self, thing: str, setting: str, number: int) -> Scene:
        """Return a scene of a thing in a setting, in the thing's original colours; `number` seeds its layout."""
        rng = np.random.default_rng([self.seed, number])
        return replace(random_scene(rng, thing=thing, setting=setting), colour=None, style="flat")


def words(thing: str, setting: str) -> str:
    """Return the caption for a picture of a thing in a setting."""
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
    """Draw the training and held-out pictures of a style, each with a ``.txt`` caption file.

    They are written to `folder`, by default to the style's own folder in this package.
    """
    folder = folder or style.folder
    for split, subjects in (("learn", style.learn), ("held-out", style.held_out)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, (thing, setting) in enumerate(subjects, 1):
            picture = style.draw(style.scene(thing, setting, number + (split == "held-out") * 100))
            picture.save(folder / split / f"{number:02d}.png", optimize=True)
            (folder / split / f"{number:02d}.txt").write_text(words(thing, setting) + "\n", "utf-8")


if __name__ == "__main__":
    write_pictures(SCREEN_PRINT)
