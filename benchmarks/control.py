"""Pictures steered by edges on `tiny`, with networks of the recipe `control`: ``python -m benchmarks.control``.

It draws captioned pictures of the world, trains each method on them, and draws unseen scenes with and without the edges
of their pictures. ``--runs FOLDER`` keeps the runs in a folder, and measures those that are there already instead of
training.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.few_steps import PICTURES, write_pictures
from benchmarks.tiny_base import prompts_and_scenes, through_vae, verdicts
from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.bases.tiny.world import Scene, draw
from diffgraft.edges import edges
from diffgraft.files import write_text
from diffgraft.generation.control import ControlInput
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.pixels import to_image, to_tensor
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "control.md"
PICTURE = Path(__file__).parent / "pictures" / "control.png"
SCENES, SHOWN = 32, 8
METHODS: dict[str, dict[str, Any]] = {
    "controlnet": {},
    "control-lora": {"rank": 16, "lr": 2e-3},
    "lllite": {"lr": 2e-3},
}
"""Method → settings beside those of the recipe"""
HEAD = f"""# Steered by edges

`python -m benchmarks.control` wrote this page. The recipe `control` was trained on {PICTURES} captioned pictures of the
world of `tiny` by each method, with the settings in its row. Then {SCENES} unseen scenes were drawn from their prompts,
each with the edges of its own picture as condition picture, in 25 steps, at strength 1.

*Edge agreement* compares the edges of a drawn picture with the condition picture. A pixel of an edge is matched if the
other picture has an edge at most one pixel away. Agreement is 2 · p · r / (p + r), where p is the share of the drawn
edges that are matched, and r that of the condition's; its mean over the scenes is given. The last row is the most that
the VAE lets through: the true picture, encoded and decoded. The other columns are what the judge finds right.

| | file | edge agreement | {" | ".join(LABELS)} |
|{"-|" * (3 + len(LABELS))}
"""
TAIL = """
`lllite` steers at attentions alone, which `tiny` has for tokens of 8 and 16 pixels, an eighth of the picture and more;
`controlnet` and `control-lora` also add to the skip connections of finer levels.

![Rows: pictures of unseen scenes, their edges, and pictures drawn with the prompt alone and with each method](../pictures/control.png)

The first pictures, not chosen: the scene, its edges, and what was drawn from the same prompt and noise without and with
the networks.
"""  # noqa: E501


def agreement(drawn: Image.Image, condition: Image.Image) -> float:
    """Return the edge agreement of a drawn picture with a condition picture of edges, from 0 to 1."""
    found, wanted = (np.asarray(image.convert("L")) > 127 for image in (edges(drawn), condition))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision, recall = (found & _near(wanted)).sum() / found.sum(), (wanted & _near(found)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(lines: np.ndarray) -> np.ndarray:
    """Return the pixels that are at most one pixel away from a line, by sides or corners, [h, w]."""
    height, width = lines.shape
    padded = np.pad(lines, 1)
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def draw_steered(
    base: Base, network: Path | None, prompts: Sequence[str], conditions: Sequence[Image.Image]
) -> list[Image.Image]:
    """Draw each prompt with its own condition picture; without a network, by the prompts alone."""
    with Session(base) as session:
        if network is None:
            return session.draw_each(prompts, range(len(prompts)))
        images = []
        for seed, (prompt, condition) in enumerate(zip(prompts, conditions, strict=True)):
            session.steer(network, ControlInput(condition))
            images += session.draw(prompt, [seed])
        return images


def measure(base: Base, networks: Mapping[str, Path]) -> tuple[dict[str, list[float]], dict[str, list[Image.Image]]]:
    """Return the figures of each row of the page, and pictures to show, for networks by the names of their rows."""
    judge = load_judge(TINY / "judge")
    prompts, scenes = prompts_and_scenes(SCENES)
    pictures = [draw(scene)[0] for scene in scenes]
    conditions = [edges(picture) for picture in pictures]
    named: dict[str, Path | None] = {"the prompt alone": None, **networks}
    drawn = {name: draw_steered(base, network, prompts, conditions) for name, network in named.items()}
    through = {
        "the true picture, through the VAE": [to_image(own) for own in through_vae(base.vae, to_tensor(pictures))]
    }
    rows = {}
    for name, images in {**drawn, **through}.items():
        agreed = [agreement(image, condition) for image, condition in zip(images, conditions, strict=True)]
        rows[name] = [float(np.mean(agreed)), *_right(judge, images, scenes)]
    shown = {"scene": pictures, "edges": conditions, **drawn}
    return rows, {name: images[:SHOWN] for name, images in shown.items()}


def _right(judge: torch.nn.Module, images: Sequence[Image.Image], scenes: list[Scene]) -> list[float]:
    """Return the share of pictures that the judge finds right, by label; colours where the scene has one."""
    right = verdicts(judge, to_tensor(images), scenes)
    named = {"colour": torch.tensor([scene.colour is not None for scene in scenes])}
    return [float(right[label][named.get(label, slice(None))].float().mean()) for label in LABELS]


def trained(base: Base, folder: Path) -> dict[str, Path]:
    """Return the name of the row of each method → the folder of its run inside `folder`; missing ones are trained."""
    runs = {}
    for method, settings in METHODS.items():
        run = folder / method
        if not (run / "adapter.safetensors").is_file():
            if not (folder / "pictures").is_dir():
                (folder / "pictures").mkdir(parents=True)
                write_pictures(folder / "pictures")
            train("control", base=base, images=folder / "pictures", output=run, method=method, **settings)
        told = " ".join(f"{key}={value:g}" for key, value in settings.items())
        runs[" ".join(filter(None, (f"`{method}`", told)))] = run
    return runs


def main() -> None:
    """Train, measure, and write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder with runs that are measured, and that others are kept in")
    kept, base = parser.parse_args().runs, load_base("tiny")
    with tempfile.TemporaryDirectory() as name:
        runs = trained(base, kept or Path(name))
        sizes = {row: (run / "adapter.safetensors").stat().st_size / 1e6 for row, run in runs.items()}
        rows, shown = measure(base, runs)
    lines = [HEAD]
    for row, (agreed, *right) in rows.items():
        size = f"{sizes[row]:.1f} MB" if row in sizes else ""
        lines.append(f"| {row} | {size} | {agreed:.2f} | {' | '.join(f'{100 * share:.0f} %' for share in right)} |\n")
    save_image(grid(shown), PICTURE)
    write_text(PAGE, "".join([*lines, TAIL]))


if __name__ == "__main__":
    main()
