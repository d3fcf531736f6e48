"""``diffgraft demo``: five pictures in, an adapter and three new settings out."""

from collections.abc import Iterator
from pathlib import Path

from diffgraft.bases import load_base
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.subject import POODLE
from diffgraft.generation.generate import Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.generation.plots import grid, save_image
from diffgraft.trainers.run.train import train

NEW_SETTINGS = ("in the snow", "at night", "in the jungle")
COUNT = 5


def run_demo(output: Path) -> Iterator[str]:
    """Train on the five pictures, draw the subject where it has never been; yields lines for the person watching."""
    number = 1
    while (output / f"run-{number}").exists():
        number += 1
    folder = output / f"run-{number}"
    pictures = [picture.image for picture in read_folder(POODLE.folder / "learn")]
    yield f"Learning a made-up {POODLE.noun} from {len(pictures)} pictures the base has never seen …"
    base = load_base("tiny")
    run = train("subject", base=base, images=POODLE.folder / "learn", subject=POODLE.noun, output=folder)

    prompts = [f"a sks {POODLE.noun} {setting}" for setting in NEW_SETTINGS]
    listed = [prompt for prompt in prompts for _ in range(COUNT)]
    seeds = list(range(100, 100 + COUNT)) * len(prompts)
    with graft(base, {run.adapter_file: 1.0}):
        drawn = generate(
            base.pipeline(), listed, Settings(batch=len(listed)), seeds, "drawing the subject in new settings"
        )
    rows = {"the five pictures it learnt from": pictures}
    rows |= {f"“{prompt}”": drawn[i * COUNT : (i + 1) * COUNT] for i, prompt in enumerate(prompts)}
    sheet = save_image(grid(rows), folder / "demo.png")
    yield f"Look at {sheet}: the pictures it learnt from, and what it draws now."
    yield f"The adapter, {run.adapter_file.stat().st_size / 1000:.0f} kB, is {run.adapter_file}. Try it:"
    yield f'    diffgraft generate "a sks {POODLE.noun} on the beach" --adapter {run.adapter_file} -n 4'
