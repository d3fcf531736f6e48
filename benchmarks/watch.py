"""Wrong pictures and wrong captions that a watch finds: ``python -m benchmarks.watch``.

Made-up subjects that no picture of the world of `tiny` shows are trained on five pictures and on a sixth one of another
subject under the same prompt; and styles of the world, under a word of their own, on twelve pictures, of which one has
the caption of a thirteenth. Each is repeated with other subjects, settings and captions, and once more without anything
wrong. It takes about twenty minutes on two cores.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from diffgraft.bases import Base, load_base
from diffgraft.bases.tiny.world import draw
from diffgraft.bases.tiny.world.glyphs import HELD_BACK, HELD_BACK_FOR_TESTS, glyph_sprite
from diffgraft.bases.tiny.world.scene import SETTING_WORDS, random_scene
from diffgraft.bases.tiny.world.things import THINGS
from diffgraft.demo.style import words
from diffgraft.demo.subject import ALIEN, HELD_OUT, POODLE, Subject
from diffgraft.files import write_text
from diffgraft.progress import reporting, silent
from diffgraft.trainers.hooks.watch_findings import find, mean_gains
from diffgraft.trainers.hooks.watch_record import read_record
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "watch.md"
SEEDS = range(100, 110)
STEPS, EVERY = 60, 10
RIGHT, CAPTIONED = 5, 12
"""Right pictures of a subject, beside a wrong one; pictures of the style, one of which has a wrong caption"""
HEAD = f"""# Planted wrong pictures and captions

`python -m benchmarks.watch` wrote this page. Each run has {STEPS} steps and `watch_every={EVERY}`. *Subject*: {RIGHT}
pictures of a made-up subject and one of another under the same prompt, by the recipe `subject`. *Style*: {CAPTIONED}
pictures in a style of the world (line drawing, pixel art, watercolour in turn) under a word of its own, one with the
caption of another picture, by the recipe `style` without prior preservation. Subjects, settings, layouts and captions
differ from run to run, and from those that the limit was set on. *Found*: the wrong one is named as an outlier. *Others
named*: right pictures that are named too. *Share*: the gain of a picture's prompt as a share of the median gain of the
others; below 0.5 it is an outlier.

| | found | others named | share of the wrong one | smallest share of the others |
|-|-|-|-|-|
"""


@dataclass(frozen=True)
class Planted:
    """A folder of pictures, one of which may be wrong."""

    recipe: str
    settings: dict[str, Any]
    wrong: str
    """Name of the wrong picture; empty: all are right"""


@dataclass(frozen=True)
class Result:
    """What a watch says of a folder."""

    named: Sequence[str]
    """Names of all outliers"""
    wrong: str
    shares: dict[str, float]
    """Name → gain of the picture's prompt as a share of the median gain of the others"""

    @property
    def is_found(self) -> bool:
        return self.wrong in self.named

    @property
    def others(self) -> list[str]:
        """Names of right pictures that are named."""
        return [name for name in self.named if name != self.wrong]


def subjects() -> list[Subject]:
    """Return all made-up subjects: the two of the demo, and glyphs that no picture of the world shows."""
    glyphs = {**HELD_BACK, **HELD_BACK_FOR_TESTS}

    def of(name: str) -> Subject:
        return Subject(name, glyphs[name].noun, lambda: glyph_sprite(glyphs[name].glyph), (0, 0))

    return [POODLE, ALIEN, *map(of, glyphs)]


def plant_picture(folder: Path, seed: int, *, is_planted: bool = True) -> Planted:
    """Draw pictures of a subject, and instead of one of them a picture of another subject."""
    rng = np.random.default_rng(seed)
    known = subjects()
    subject, other = (known[place] for place in rng.choice(len(known), 2, replace=False))
    settings = [str(setting) for setting in rng.permutation(HELD_OUT)[: RIGHT + 1]]
    wrong = int(rng.integers(len(settings)))
    for number, setting in enumerate(settings):
        shown = other if is_planted and number == wrong else subject
        (scene,) = shown.scenes((setting,), int(rng.integers(2**31)))
        draw(scene, shown.cutout())[0].save(folder / f"{number:02}.png")
    return Planted("subject", {"subject": subject.noun}, f"{wrong:02}.png" if is_planted else "")


def plant_caption(folder: Path, seed: int, *, is_planted: bool = True) -> Planted:
    """Draw captioned pictures in a style, and give one of them the caption of a picture that is not there."""
    rng = np.random.default_rng(seed)
    style = ("line", "pixel", "watercolour")[seed % 3]
    settings = [name for name, texts in SETTING_WORDS.items() if "{" not in texts[0]]
    things = map(str, rng.permutation(list(THINGS))[: CAPTIONED + 1])
    *pairs, other = zip(things, cycle(map(str, rng.permutation(settings))), strict=False)
    wrong = int(rng.integers(len(pairs)))
    for number, (thing, setting) in enumerate(pairs):
        pair = (thing, setting)
        scene = random_scene(np.random.default_rng([seed, number]), thing=thing, setting=setting, style=style)
        draw(replace(scene, colour=None))[0].save(folder / f"{number:02}.png")
        told = other if is_planted and number == wrong else pair
        (folder / f"{number:02}.txt").write_text(words(*told), "utf-8")
    return Planted("style", {"prior": {"weight": 0}}, f"{wrong:02}.png" if is_planted else "")


def watched(planted: Planted, folder: Path, base: Base, seed: int, steps: int = STEPS) -> Result:
    """Train on the pictures in a folder, and return what the watch says."""
    quiet = {"previews": False, "sample_every": 0, "checkpoint_every": 0, "cache": False}
    with tempfile.TemporaryDirectory() as output, reporting(silent):
        run = train(
            planted.recipe, base=base, images=folder, output=Path(output) / "run", steps=steps, watch_every=EVERY,
            seed=seed, **quiet, **planted.settings,
        )  # fmt: skip
        record = read_record(run.folder / "watch.json")
    gains = mean_gains(record)
    shares = {
        record.pictures[index].name: gain / float(np.median([own for other, own in gains.items() if other != index]))
        for index, gain in gains.items()
    }
    named = [name for finding in find(record) if finding.kind == "outlier" for name in finding.pictures]
    return Result(named, planted.wrong, shares)


def row(title: str, results: Sequence[Result]) -> str:
    """Return the row of a table for several runs."""
    named = sum(len(result.others) for result in results)
    pictures = sum(len(result.shares) - bool(result.wrong) for result in results)
    others = [min(own for name, own in result.shares.items() if name != result.wrong) for result in results]
    of_wrong = [result.shares[result.wrong] for result in results if result.wrong]
    found = f"{sum(result.is_found for result in results)} of {len(of_wrong)}" if of_wrong else "–"
    return f"| {title} | {found} | {named} of {pictures} | {_span(of_wrong)} | {_span(others)} |\n"


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} … {max(values):.2f}" if values else "–"


def main() -> None:
    """Measure, and write the page."""
    base = load_base("tiny")
    kinds = {"subject, wrong picture": plant_picture, "style, wrong caption": plant_caption}
    rows = []
    for title, plant in kinds.items():
        for is_planted in (True, False):
            results = []
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as folder:
                    planted = plant(Path(folder), seed, is_planted=is_planted)
                    results.append(watched(planted, Path(folder), base, seed))
                shares = {name: round(own, 2) for name, own in results[-1].shares.items()}
                print(title, seed, results[-1].wrong, results[-1].named, shares, flush=True)
            rows.append(row(title if is_planted else f"{title.partition(',')[0]}, all right", results))
            write_text(PAGE, HEAD + "".join(rows))


if __name__ == "__main__":
    main()
