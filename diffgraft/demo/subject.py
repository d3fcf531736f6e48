"""The made-up subject of the demo, drawn: ``python -m diffgraft.demo.subject`` makes its pictures again.

It is a poodle, a shape that no picture of the embedded base's world shows, with a turquoise coat, orange patches and a
violet scarf. Five pictures are for learning, eight others, with masks of the subject, for measuring what was learnt.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from diffgraft.bases.tiny.world import Scene, draw
from diffgraft.bases.tiny.world.things import CELL, KEPT_BACK, recolour, sprite

FOLDER = Path(__file__).with_name("pictures")
CLASS = "dog"


@dataclass(frozen=True)
class Split:
    """A folder of pictures and the settings they show, one picture each."""

    name: str
    settings: tuple[str, ...]
    seed: int


LEARN = Split("learn", ("grass", "city", "kitchen", "desert", "plain"), 11)
HELD_OUT = Split("held-out", ("grass", "city", "kitchen", "desert", "plain", "beach", "sunset", "striped"), 12)


def cutout() -> Image.Image:
    """The subject, RGBA, `CELL` × `CELL`."""
    poodle = sprite(KEPT_BACK[0])
    coat = Image.fromarray(recolour(np.asarray(poodle), (0.10, 0.72, 0.68)))
    paint = Image.new("RGBA", coat.size)
    pen = ImageDraw.Draw(paint)
    for x, y, r in (
        (0.50, 0.52, 0.085),
        (0.68, 0.62, 0.07),
        (0.30, 0.13, 0.06),
        (0.88, 0.22, 0.06),
        (0.36, 0.80, 0.05),
    ):
        pen.ellipse([(x - r) * CELL, (y - r) * CELL, (x + r) * CELL, (y + r) * CELL], fill=(250, 140, 20, 255))
    pen.line([(0.24 * CELL, 0.40 * CELL), (0.46 * CELL, 0.47 * CELL)], fill=(140, 40, 190, 255), width=11)
    inside = ImageChops.multiply(paint.getchannel("A"), coat.getchannel("A"))
    coat.paste(paint, (0, 0), inside)
    return coat


def scenes(split: Split) -> list[Scene]:
    """The scenes of a split: places, sizes and tilts drawn from its seed."""
    rng = np.random.default_rng(split.seed)
    return [
        Scene(
            thing=CLASS,
            setting=setting,
            backdrop="yellow",
            size=float(rng.uniform(0.66, 0.82)),
            x=float(0.5 + rng.uniform(-0.08, 0.08)),
            y=float(0.54 + rng.uniform(-0.06, 0.06)),
            tilt=float(rng.uniform(-8, 8)),
            mirrored=bool(number % 2),
            seed=int(rng.integers(2**31)),
        )
        for number, setting in enumerate(split.settings)
    ]


def write_pictures(folder: Path = FOLDER) -> None:
    """Draw both splits; the held-out pictures get a mask each, white where the subject is."""
    for split in (LEARN, HELD_OUT):
        (folder / split.name).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes(split), 1):
            picture, mask = draw(scene, cutout())
            picture.save(folder / split.name / f"{number:02d}.png", optimize=True)
            if split is HELD_OUT:
                (folder / "held-out-masks").mkdir(exist_ok=True)
                mask.save(folder / "held-out-masks" / f"{number:02d}.png", optimize=True)


if __name__ == "__main__":
    write_pictures()
