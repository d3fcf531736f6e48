"""Pictures along the axes of sliders, judged: ``python -m benchmarks.slider``.

It trains the recipe `slider` from a snowy day to night, at strength 1 alone and at strengths 1 and −1, and the recipe
`picture-slider` on pairs of small and large things. It generates pictures of several things at strengths from −2 to 2,
from the same noise, and measures what they show, by the judge of `tiny` and by the size of outlines. It takes about ten
minutes on two cores.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.learning.shape import silhouette
from diffgraft.bases import load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.bases.tiny.train.pictures import SEED, scene_at
from diffgraft.bases.tiny.world import caption, draw
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from diffgraft.trainers.run.train import train

HERE = Path(__file__).parent
PAGE, PICTURES = HERE / "results" / "slider.md", HERE / "pictures"
THINGS = ("dog", "cat", "car", "house", "tree", "teapot")
EACH = 3
"""Number of pictures of each thing at each strength"""
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
PAIRS, FIRST, SIZES = 60, 60_000, (0.78, 0.5)
"""Number of pairs, index of the first scene, and sides of the things as shares of the picture's, positive first"""
HEAD = f"""# Sliders

`python -m benchmarks.slider` wrote this page. At each strength, {EACH} pictures of each of {len(THINGS)} things were
generated from the same noise.

## From a snowy day to night, by two prompts

The recipe `slider` was trained as it is: its target is "a dog", and its axis goes from "a dog in the snow" to "a dog at
night". Prompts such as "a cat" name no place. The judge gives the probabilities of night and snow, and the share in
which the thing is right; brightness is a mean from 0 to 1. Below it, the same with `loss.options.both=true`, which
trains strength −1 as well.

"""
TEXT_TABLE = """| strength | night | snow | brightness | thing |
|-|-|-|-|-|
"""
BOTH = """
With `loss.options.both=true`:

"""
PAIRS_HEAD = f"""
The axis was learned on dogs alone. It carries over to other things, though not to all of them: see the house.

![Six things at seven strengths, from a snowy day to night](../pictures/slider.png)

## From small to large, by pairs of pictures

The recipe `picture-slider` was trained as it is on {PAIRS} pairs of scenes of the world of `tiny`, whose thing is
{SIZES[0]:g} of the picture's side wide in one picture and {SIZES[1]:g} in the other, at the same place; captions, such
as "a cat on the beach", name no size. Prompts are such as "a dog on a plain white background". Size is the share of the
picture that differs from the background, relative to that at strength 0; *larger* is the share of pictures with a
larger thing than at the strength before.

| strength | size | larger | thing |
|-|-|-|-|
"""
PAIRS_TAIL = """
Captions of the world name no size, and yet strengths from −1 to 2 set it without changing the thing. At −2, twice what
was trained, things become so small that some vanish.

![Six things at seven strengths, from small to large](../pictures/picture-slider.png)
"""


def write_pairs(folder: Path) -> None:
    """Draw captioned pictures of large things into a folder, and the same with small things into `negative` in it."""
    (folder / "negative").mkdir(parents=True)
    for number in range(PAIRS):
        scene = replace(scene_at(FIRST + number), x=0.5, y=0.55)
        for size, own in zip(SIZES, (folder, folder / "negative"), strict=True):
            draw(replace(scene, size=size))[0].save(own / f"{number:04d}.png")
        text = caption(scene, np.random.default_rng([SEED, 13, number]))
        (folder / f"{number:04d}.txt").write_text(text, "utf-8")


def generate(adapter: Path, prompts: Sequence[str], sheet: Path | None) -> list[list[Image.Image]]:
    """Generate the pictures of prompts at each strength, and save one of each thing as `sheet`."""
    rows = []
    for strength in STRENGTHS:
        with Session(load_base("tiny")) as session:
            if strength:
                session.use(adapter, strength)
            rows.append(session.draw_each(prompts, range(len(prompts)), DrawSettings(batch=len(prompts))))
    if sheet is not None:
        shown = zip(STRENGTHS, rows, strict=True)
        save_image(grid({f"strength {strength:g}": row[: len(THINGS)] for strength, row in shown}), sheet)
    return rows


@torch.no_grad()
def answers(images: Sequence[Image.Image]) -> tuple[float, float, float]:
    """Return the judge's mean probabilities of night and snow, and the share of pictures with the right thing."""
    judged = load_judge(TINY / "judge")(to_tensor(images))
    chance = judged["setting"].softmax(1).mean(0)
    night, snow = (float(chance[LABELS["setting"].index(name)]) for name in ("night", "snow"))
    things = torch.tensor([LABELS["thing"].index(thing) for thing in THINGS * EACH])
    return night, snow, float((judged["thing"].argmax(1) == things).float().mean())


def text_rows(rows: Sequence[Sequence[Image.Image]]) -> list[str]:
    """Return the table of the slider from day to night."""
    lines = []
    for strength, images in zip(STRENGTHS, rows, strict=True):
        night, snow, right = answers(images)
        bright = float(to_tensor(images).mean()) / 2 + 0.5
        shares = f"{100 * night:.0f} % | {100 * snow:.0f} % | {bright:.2f} | {100 * right:.0f} %"
        lines.append(f"| {strength:g} | {shares} |\n")
    return lines


def size_rows(rows: Sequence[Sequence[Image.Image]]) -> list[str]:
    """Return the table of the slider from small to large."""
    sizes = np.array([[silhouette(image).mean() for image in images] for images in rows])
    own, lines = sizes[STRENGTHS.index(0.0)].mean(), []
    for place, (strength, images) in enumerate(zip(STRENGTHS, rows, strict=True)):
        larger = f"{100 * (sizes[place] > sizes[place - 1]).mean():.0f} %" if place else ""
        size, right = sizes[place].mean() / own, answers(images)[2]
        lines.append(f"| {strength:g} | {size:.2f} | {larger} | {100 * right:.0f} % |\n")
    return lines


Rows = Callable[[Sequence[Sequence[Image.Image]]], list[str]]


def main() -> None:
    """Measure, and write the page and its pictures."""
    plain = [f"a {thing}" for thing in THINGS * EACH]
    backed = [f"a {thing} on a plain white background" for thing in THINGS * EACH]
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        write_pairs(pairs)

        def lines(recipe: str, prompts: Sequence[str], sheet: str, rows: Rows, **settings: Any) -> str:
            run = train(recipe, base=load_base("tiny"), output=Path(folder) / f"run-{sheet}", **settings)
            return "".join(rows(generate(run.adapter_file, prompts, PICTURES / sheet if sheet else None)))

        text = lines("slider", plain, "slider.png", text_rows)
        both = lines("slider", plain, "", text_rows, **{"loss.options.both": True})
        sizes = lines("picture-slider", backed, "picture-slider.png", size_rows, images=pairs)
    write_text(PAGE, "".join([HEAD, TEXT_TABLE, text, BOTH, TEXT_TABLE, both, PAIRS_HEAD, sizes, PAIRS_TAIL]))


if __name__ == "__main__":
    main()
