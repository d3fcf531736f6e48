"""Two trained subjects in one picture, by regions and by merging both adapters: ``python -m benchmarks.regions``.

It trains two adapters on `tiny` with the recipe `subject`, draws both subjects side by side, and writes the page and
its picture. It takes about five minutes on two cores.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.learning.measure import centre, features
from benchmarks.learning.targets import Target, made_up
from diffgraft.bases import load_base
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.regions import Region
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from diffgraft.trainers.run.train import train

FOLDER = Path(__file__).parent
PAGE, SHEET = FOLDER / "results/regions.md", FOLDER / "pictures/regions.png"
SUBJECTS = {"poodle": "sks", "alien": "ohwx"}
"""Subject → its trigger"""
PLACES = ("in the snow", "on the beach", "at night", "in the jungle")
COUNT = 8
"""Pictures of each place"""
HEAD = """# Two subjects in one picture

`python -m benchmarks.regions` wrote this page: two adapters, trained on `tiny` with the recipe `subject` (triggers
`sks` and `ohwx`), and pictures of {size} pixels with the poodle on the left and the alien on the right, {count} in
each of {places} places.

The judge's features tell how much more a half of a picture is like references of a subject than like references of
others of its class. *likeness*: this figure of a subject's own half, as a share of that with its adapter alone in the
picture. *leak*: how much it rises in the other half by this subject's adapter, as a share of what the adapter does in
its own half.

| way | likeness of the poodle | of the alien | leak of the poodle | of the alien |
|-|-|-|-|-|
"""

Drawn = list[Image.Image]


def draw(session: Session, words: Sequence[str], adapters: Sequence[str], *, merged: bool = False) -> Drawn:
    """Draw both subjects side by side in every place.

    Args:
        session: session whose library has the adapters by name.
        words: what is on the left and on the right.
        adapters: name of the adapter of each, empty for none.
        merged: whether adapters act everywhere instead of in their region.
    """
    base, drawn = session.base, []
    for place in PLACES:
        tags = [f" <lora:{name}:1>" if name else "" for name in adapters]
        inside = ["", ""] if merged else tags
        regions = tuple(
            Region(f"a {text} {place}{tag}", (half / 2, 0, (half + 1) / 2, 1))
            for half, (text, tag) in enumerate(zip(words, inside, strict=True))
        )
        prompt = f"a {words[0]} and a {words[1]} {place}" + ("".join(tags) if merged else "")
        settings = DrawSettings(size=(2 * base.resolution, base.resolution), regions=regions)
        drawn += session.draw(prompt, range(100, 100 + COUNT), settings)
    return drawn


def margins(pictures: Drawn, half: int, target: Target) -> list[float]:
    """Return how much more each picture's half is like a target than like others of its class."""
    width, height = pictures[0].width // 2, pictures[0].height
    crops = [picture.crop((half * width, 0, (half + 1) * width, height)) for picture in pictures]
    having = centre([image for prompt in target.new for image in prompt.having])
    lacking = centre([image for prompt in target.new for image in prompt.lacking])
    with torch.no_grad():
        seen = features(to_tensor(crops))
        return list(map(float, seen @ having - seen @ lacking))


def main() -> None:
    """Train, draw, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/regions"), help="folder of both runs, which is kept")
    runs: Path = parser.parse_args().runs
    base, targets = load_base("tiny"), made_up()
    for name, trigger in SUBJECTS.items():
        if not (runs / name / "adapter.safetensors").exists():
            more = {"subject": targets[name].noun, "trigger": trigger, "sample_every": 0, "previews": False}
            train("subject", base=base, images=targets[name].learn, output=runs / name, **more)
    own = [f"{trigger} {targets[name].noun}" for name, trigger in SUBJECTS.items()]
    plain = [targets[name].noun for name in SUBJECTS]
    names = list(SUBJECTS)
    with Session(base, runs) as session:
        drawn = {
            "without adapters": draw(session, plain, ["", ""]),
            "poodle alone": draw(session, [own[0], plain[1]], [names[0], ""]),
            "alien alone": draw(session, [plain[0], own[1]], ["", names[1]]),
            "regions": draw(session, own, names),
            "merged": draw(session, own, names, merged=True),
        }
    alone = [drawn["poodle alone"], drawn["alien alone"]]
    lines = [HEAD.format(size="128 × 64", count=COUNT, places=len(PLACES))]
    for way in ("regions", "merged"):
        likeness, leak = [], []
        for half, name in enumerate(SUBJECTS):
            target, other = targets[name], 1 - half

            def mean(pictures: Drawn, side: int, target: Target = target) -> float:
                return statistics.mean(margins(pictures, side, target))

            effect = mean(alone[half], half) - mean(drawn["without adapters"], half)
            likeness.append(mean(drawn[way], half) / mean(alone[half], half))
            leak.append((mean(drawn[way], other) - mean(alone[other], other)) / effect)
        lines.append(f"| {way} | " + " | ".join(f"{100 * value:.0f} %" for value in (*likeness, *leak)) + " |\n")
    lines.append("\n![The first pictures of each way](../pictures/regions.png)\n")
    save_image(
        grid({way: [pictures[row * COUNT] for row in range(len(PLACES))] for way, pictures in drawn.items()}), SHEET
    )
    write_text(PAGE, "".join(lines))


if __name__ == "__main__":
    main()
