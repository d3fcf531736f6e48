"""A field of pictures that `tiny` does not know, learned with the recipe `domain`: ``python -m benchmarks.domain``.

The field is screen prints of the tiny world, whose captions do not name the style. It takes about three minutes on two
cores, and writes the page and a grid of pictures.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.tiny_base import verdicts
from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import load_judge
from diffgraft.bases.tiny.world import SETTINGS, THINGS, Scene
from diffgraft.demo.style import INKS, SCREEN_PRINT, words
from diffgraft.files import write_text
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.pixels import to_tensor
from diffgraft.trainers.hooks.validation_set import ValidationSet, validation_set_from_images
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "domain.md"
GRID = Path(__file__).parent / "pictures" / "domain.png"
PICTURES, HELD_OUT, SHOWN = 300, 96, 8
"""Number of training pictures, of held-out pictures, and of those whose captions the grid shows"""
FARTHEST = 24
"""Largest distance from the nearest ink, as the mean of a picture's channels, of 255, at which it counts as a print"""
HEAD = f"""# A field of pictures that the base does not know

`python -m benchmarks.domain` wrote this page: the recipe `domain` on `tiny`, with {PICTURES} captioned screen prints of
its world, whose captions do not name the style. *Loss* is that of {HELD_OUT} other prints under their captions.
Pictures were drawn for these captions: in *prints* the colours of pixels are close to the four inks, and in *things*
the judge, which knows no prints, sees the thing of the caption. *Drawings* are the prints themselves.

| | loss | prints | things |
|-|-|-|-|
"""


def scenes(count: int, seed: int) -> list[Scene]:
    """Return random scenes of the field: things in their own colours, in all settings but plain ones."""
    rng = np.random.default_rng([61, seed])
    settings = [setting for setting in SETTINGS if setting != "plain"]
    pairs = [(str(rng.choice(list(THINGS))), str(rng.choice(settings))) for _ in range(count)]
    return [SCREEN_PRINT.scene(thing, setting, 10_000 * (seed + 1) + n) for n, (thing, setting) in enumerate(pairs)]


def write_field(folder: Path) -> None:
    """Draw the training pictures into a folder, each with its caption."""
    folder.mkdir()
    for number, scene in enumerate(scenes(PICTURES, 0)):
        SCREEN_PRINT.draw(scene).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(words(scene.thing, scene.setting), "utf-8")


def is_print(picture: Image.Image) -> bool:
    """Whether the colours of a picture are close to the inks."""
    pixels = np.asarray(picture, np.float32).reshape(-1, 1, 3)
    return bool(np.abs(pixels - np.asarray(INKS, np.float32)).mean(2).min(1).mean() < FARTHEST)


def row(pictures: list[Image.Image], of: list[Scene], loss: float | None) -> str:
    """Return a row of the table, without its first cell."""
    things = verdicts(load_judge(TINY / "judge"), to_tensor(pictures), of)["thing"].float().mean()
    prints = np.mean([is_print(picture) for picture in pictures])
    return f"{'–' if loss is None else f'{loss:.3f}'} | {100 * prints:.0f} % | {100 * float(things):.0f} % |\n"


def drawn(base: Base, captions: list[str], held_out: ValidationSet) -> tuple[list[Image.Image], float]:
    """Return a picture of each caption, and the loss of the held-out pictures."""
    return Session(base).draw_each(captions, range(len(captions))), held_out.loss(base, captions)


@torch.no_grad()
def measure(folder: Path) -> tuple[list[str], Image.Image]:
    """Train, and return the rows of the table and the grid of pictures."""
    base, unseen = load_base("tiny"), scenes(HELD_OUT, 1)
    captions, prints = [words(scene.thing, scene.setting) for scene in unseen], [*map(SCREEN_PRINT.draw, unseen)]
    held_out = validation_set_from_images(base, prints)
    write_field(folder / "field")
    with torch.enable_grad():
        adapter = train("domain", base=base, images=folder / "field", output=folder / "run").adapter
    before, first = drawn(base, captions, held_out)
    with graft(base, adapter):
        after, last = drawn(base, captions, held_out)
    rows = {"the base": (before, first), "with the adapter": (after, last), "drawings": (prints, None)}
    lines = [f"| {name} | {row(pictures, unseen, loss)}" for name, (pictures, loss) in rows.items()]
    return lines, grid({name: pictures[:SHOWN] for name, (pictures, _) in rows.items()})


def main() -> None:
    """Measure, and write the page and the grid."""
    with tempfile.TemporaryDirectory() as folder:
        lines, sheet = measure(Path(folder))
    save_image(sheet, GRID)
    write_text(PAGE, HEAD + "".join(lines) + "\n![Pictures of eight captions, in each row](../pictures/domain.png)\n")


if __name__ == "__main__":
    main()
