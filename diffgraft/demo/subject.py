"""Made-up subjects that the embedded base has never seen; no picture of its world shows their shapes.

Each subject has five training pictures, and eight held-out pictures with masks of the subject for evaluation.
``python -m diffgraft.demo.subject`` draws them again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from diffgraft.bases.tiny.world import Scene, draw
from diffgraft.bases.tiny.world.things import CELL, KEPT_BACK, recolour, sprite

PICTURES = Path(__file__).with_name("pictures")


@dataclass(frozen=True)
class Subject:
    """A made-up subject that looks the same in all its pictures."""

    name: str
    noun: str
    """Class noun of the subject: a thing of the tiny world."""
    cutout: Callable[[], Image.Image]
    """Function that draws the subject's cut-out, RGBA, `CELL` × `CELL`."""
    seeds: tuple[int, int]
    """Random seeds of the training pictures and of the held-out pictures."""

    @property
    def folder(self) -> Path:
        """Folder with ``learn/``, ``held-out/`` and ``held-out-masks/``."""
        return PICTURES / self.name

    def scenes(self, settings: tuple[str, ...], seed: int) -> list[Scene]:
        """Return one scene for each setting; `seed` determines positions, sizes and tilts."""
        rng = np.random.default_rng(seed)
        return [
            Scene(
                thing=self.noun,
                setting=setting,
                backdrop="yellow",
                size=float(rng.uniform(0.66, 0.82)),
                x=float(0.5 + rng.uniform(-0.08, 0.08)),
                y=float(0.54 + rng.uniform(-0.06, 0.06)),
                tilt=float(rng.uniform(-8, 8)),
                mirrored=bool(number % 2),
                seed=int(rng.integers(2**31)),
            )
            for number, setting in enumerate(settings)
        ]


LEARN = ("grass", "city", "kitchen", "desert", "plain")
"""Setting of each training picture."""
HELD_OUT = (*LEARN, "beach", "sunset", "striped")
"""Setting of each held-out picture."""


def _poodle() -> Image.Image:
    """Draw a turquoise poodle with orange patches and a violet scarf."""
    coat = Image.fromarray(recolour(np.asarray(sprite(KEPT_BACK[0])), (0.10, 0.72, 0.68)))
    paint = Image.new("RGBA", coat.size)
    pen = ImageDraw.Draw(paint)
    for x, y, r in (
        (0.50, 0.52, 0.085),
        (0.68, 0.62, 0.07),
        (0.30, 0.13, 0.06),
        (0.88, 0.22, 0.06),
        (0.36, 0.80, 0.05),
    ):
        _disc(pen, x, y, r, (250, 140, 20))
    pen.line([(0.24 * CELL, 0.40 * CELL), (0.46 * CELL, 0.47 * CELL)], fill=(140, 40, 190, 255), width=11)
    inside = ImageChops.multiply(paint.getchannel("A"), coat.getchannel("A"))
    coat.paste(paint, (0, 0), inside)
    return coat


def _alien() -> Image.Image:
    """Draw a salmon-coloured alien head with yellow antennae, a blue forehead and a white grin."""
    small = sprite(KEPT_BACK[1]).resize((CELL * 3 // 4, CELL * 3 // 4), Image.Resampling.LANCZOS)
    head = Image.new("RGBA", (CELL, CELL))
    head.paste(Image.fromarray(recolour(np.asarray(small), (0.98, 0.50, 0.42))), (CELL // 8, CELL // 4))
    paint = Image.new("RGBA", head.size)
    pen = ImageDraw.Draw(paint)
    pen.pieslice([0.28 * CELL, 0.24 * CELL, 0.72 * CELL, 0.56 * CELL], 180, 360, fill=(40, 70, 200, 255))
    pen.chord([0.40 * CELL, 0.78 * CELL, 0.60 * CELL, 0.92 * CELL], 0, 180, fill=(255, 255, 255, 255))
    head.paste(paint, (0, 0), ImageChops.multiply(paint.getchannel("A"), head.getchannel("A")))
    pen = ImageDraw.Draw(head)
    for x, tip in ((0.38, 0.22), (0.62, 0.78)):
        pen.line([(x * CELL, 0.32 * CELL), (tip * CELL, 0.10 * CELL)], fill=(250, 205, 30, 255), width=6)
        _disc(pen, tip, 0.09, 0.075, (250, 205, 30))
    return head


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    pen.ellipse([(x - r) * CELL, (y - r) * CELL, (x + r) * CELL, (y + r) * CELL], fill=(*colour, 255))


POODLE = Subject("poodle", "dog", _poodle, (11, 12))
"""A made-up dog: the base knows dogs of another shape."""
ALIEN = Subject("alien", "robot", _alien, (21, 22))
"""The subject of ``diffgraft demo``."""


def write_pictures(subject: Subject, folder: Path | None = None) -> None:
    """Draw a subject's training and held-out pictures; the held-out ones have masks, white where the subject is.

    They are written to `folder`, by default to the subject's own folder in this package.
    """
    folder = folder or subject.folder
    for split, settings, seed in (("learn", LEARN, subject.seeds[0]), ("held-out", HELD_OUT, subject.seeds[1])):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(subject.scenes(settings, seed), 1):
            picture, mask = draw(scene, subject.cutout())
            picture.save(folder / split / f"{number:02d}.png", optimize=True)
            if split == "held-out":
                (folder / "held-out-masks").mkdir(exist_ok=True)
                mask.save(folder / "held-out-masks" / f"{number:02d}.png", optimize=True)


if __name__ == "__main__":
    for made_up in (POODLE, ALIEN):
        write_pictures(made_up)
