"""How well a subject is learnt: ``python -m benchmarks.subject`` measures the figures in the README.

For the demo's subject, over three seeds: held-out loss on its own pixels before and after, under the prompt with the
trigger and without it, and how far the class moves with prior preservation and without. With ``--photos FOLDER CLASS``
also a folder of photographs, of which every third is left out of training.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.data.class_images import class_images
from diffgraft.data.pictures import read_folder
from diffgraft.demo.subject import CLASS, FOLDER
from diffgraft.files import write_text
from diffgraft.generation.generate import Settings
from diffgraft.generation.graft import graft
from diffgraft.trainers.heldout import Probe, make_probe
from diffgraft.trainers.run import train

UNSEEN_CLASS_SEED = 77_000
"""Seed of the class pictures that drift is measured on; training uses others."""


def measure(
    base: Base, learn: Path, subject: str, probe: Probe, class_probe: Probe, seed: int, **more: Any
) -> dict[str, float]:
    """Train once and measure; all losses are held-out, all shares are of the bare base's loss."""
    with_trigger, without = f"a sks {subject}", f"a {subject}"
    before = {prompt: probe.loss(base, prompt) for prompt in (with_trigger, without)}
    class_before = class_probe.predict(base, without)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"sample_every": 0, "sample_prompts": f"a sks {subject}", **more}
        start = time.perf_counter()
        run = train(
            "subject", base=base, images=learn, subject=subject, seed=seed, output=Path(folder) / "run", **settings
        )
        seconds = time.perf_counter() - start
        with graft(base, {run.adapter: 1.0}):
            after = {prompt: probe.loss(base, prompt) for prompt in (with_trigger, without)}
            drift = class_probe.change(class_before, base, without)
        size = run.adapter_file.stat().st_size
    gain = before[with_trigger] - after[with_trigger]
    return {
        "seed": seed,
        "before": before[with_trigger],
        "after": after[with_trigger],
        "fall": gain / before[with_trigger],
        "gain without trigger": (before[without] - after[without]) / gain,
        "class drift": drift,
        "seconds": seconds,
        "bytes": size,
    }


def _table(title: str, rows: list[dict[str, float]]) -> str:
    lines = [
        f"### {title}",
        "",
        "| seed | before | after | fall | gain without trigger | class drift | seconds |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {row['before']:.4f} | {row['after']:.4f} | {row['fall']:.1%} | "
            f"{row['gain without trigger']:.1%} | {row['class drift']:.5f} | {row['seconds']:.0f} |"
        )
    fall = [row["fall"] for row in rows]
    spread = statistics.stdev(fall) if len(fall) > 1 else 0.0
    lines.append(f"\nmean fall {statistics.mean(fall):.1%}, standard deviation over seeds {spread:.1%}\n")
    return "\n".join(lines)


def main() -> None:
    """Run the measurements and print them as Markdown; ``--json FILE`` keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--photos", nargs=2, action="append", default=[], metavar=("FOLDER", "CLASS"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    more = dict(word.split("=", 1) for word in options.set)
    base = load_base("tiny")
    kept: dict[str, list[dict[str, float]]] = {}

    def class_probe(subject: str) -> Probe:
        drawn = class_images(base, f"a {subject}", 32, Settings(size=(64, 64)), UNSEEN_CLASS_SEED)
        return make_probe(base, drawn)

    masks = [Image.open(path) for path in sorted((FOLDER / "held-out-masks").glob("*.png"))]
    probe = make_probe(base, [picture.image for picture in read_folder(FOLDER / "held-out")], masks)
    dog = class_probe(CLASS)
    for title, prior in (("made-up dog, with prior preservation", {}), ("made-up dog, without", {"prior.weight": "0"})):
        settings = {**more, **prior}
        kept[title] = [
            measure(base, FOLDER / "learn", CLASS, probe, dog, seed, **settings) for seed in range(options.seeds)
        ]
        print(_table(title, kept[title]), flush=True)
    ratio = [a["class drift"] / b["class drift"] for a, b in zip(*kept.values(), strict=True)]
    print(
        f"class drift with prior preservation, as a share of that without: {statistics.mean(ratio):.1%}\n", flush=True
    )

    for folder, subject in options.photos:
        pictures = read_folder(folder)
        with tempfile.TemporaryDirectory() as learn:
            for number, picture in enumerate(pictures):
                if number % 3 != 2:
                    picture.image.save(Path(learn) / f"{number:02d}.png")
            probe = make_probe(base, [picture.image for picture in pictures[2::3]])
            seeds = range(options.seeds)
            title = f"photographs: {Path(folder).name}"
            kept[title] = [
                measure(base, Path(learn), subject, probe, class_probe(subject), seed, **more) for seed in seeds
            ]
        print(_table(title, kept[title]), flush=True)
    if options.json:
        write_text(options.json, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
