"""``diffgraft demo``: train an adapter on five pictures and draw the subject in three new settings."""

from collections.abc import Iterator
from pathlib import Path

from diffgraft.bases import load_base
from diffgraft.data.image_folder import read_folder
from diffgraft.demo.subject import ALIEN
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.run.train import train

NEW_SETTINGS = ("in the snow", "at night", "in the jungle")
"""Settings that no training picture of the subject shows."""
COUNT = 5
"""Number of pictures drawn in each setting."""


def run_demo(output: Path) -> Iterator[str]:
    """Train an adapter on the five pictures and draw the subject in new settings; yield progress messages to print.

    The adapter and ``demo.png`` are written to ``run-1`` in `output`, or to the next number that is not in use.
    """
    number = 1
    while (output / f"run-{number}").exists():
        number += 1
    folder = output / f"run-{number}"
    pictures = [picture.image for picture in read_folder(ALIEN.folder / "learn")]
    yield f"Training an adapter on {len(pictures)} pictures of a made-up alien that the base has never seen …"
    base = load_base("tiny")
    learn = ALIEN.folder / "learn"
    run = train("subject", base=base, images=learn, subject=ALIEN.noun, output=folder, previews=False)

    prompts = [f"a sks {ALIEN.noun} {setting}" for setting in NEW_SETTINGS]
    repeated = [prompt for prompt in prompts for _ in range(COUNT)]
    seeds = list(range(100, 100 + COUNT)) * len(prompts)
    with Session(base) as session:
        session.use(run.adapter_file)
        together = DrawSettings(batch=len(repeated))
        drawn = session.draw_each(repeated, seeds, together, phase_title="drawing the subject in new settings")
    rows = {"the five pictures it learnt from": pictures}
    rows |= {f"“{prompt}”": drawn[i * COUNT : (i + 1) * COUNT] for i, prompt in enumerate(prompts)}
    sheet = save_image(grid(rows), folder / "demo.png")
    yield f"Open {sheet} to compare the training pictures with pictures drawn by the adapter."
    yield f"The adapter ({run.adapter_file.stat().st_size / 1000:.0f} kB) is {run.adapter_file}. To use it, run:"
    yield f'    diffgraft generate "a sks {ALIEN.noun} on the beach" --adapter {run.adapter_file} -n 4'
