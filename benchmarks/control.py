"""Pictures steered by edges on `tiny`, with a network of the recipe `control`: ``python -m benchmarks.control``.

It draws captioned pictures of the world, trains on them, and draws unseen scenes with and without the edges of their
pictures. It takes about five minutes on two cores; ``--network RUN`` measures an earlier run instead of training.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
STRENGTHS = (0.0, 1.0)
HEAD = f"""# Steered by edges

`python -m benchmarks.control` wrote this page. The recipe `control` was trained on {PICTURES} captioned pictures of the
world of `tiny`. Then {SCENES} unseen scenes were drawn from their prompts, each with the edges of its own picture as
condition picture, in 25 steps.

*Edge agreement* compares the edges of a drawn picture with the condition picture. A pixel of an edge is matched if the
other picture has an edge at most one pixel away. Agreement is 2 · p · r / (p + r), where p is the share of the drawn
edges that are matched, and r that of the condition's; its mean over the scenes is given. The last row is the most that
the VAE lets through: the true picture, encoded and decoded. The other columns are what the judge finds right.

| | edge agreement | {" | ".join(LABELS)} |
|{"-|" * (2 + len(LABELS))}
"""
TAIL = """
![Rows: pictures of unseen scenes, their edges, and pictures drawn with the prompt alone and with the edges](../pictures/control.png)

The first pictures, not chosen: the scene, its edges, and what was drawn from the same prompt and noise without and with
the network.
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
    base: Base, network: Path, prompts: Sequence[str], conditions: Sequence[Image.Image], strength: float
) -> list[Image.Image]:
    """Draw each prompt with its own condition picture; at strength 0 without the network."""
    with Session(base) as session:
        if strength == 0:
            return session.draw_each(prompts, range(len(prompts)))
        images = []
        for seed, (prompt, condition) in enumerate(zip(prompts, conditions, strict=True)):
            session.steer(network, ControlInput(condition, strength=strength))
            images += session.draw(prompt, [seed])
        return images


def measure(base: Base, network: Path) -> tuple[dict[str, list[float]], dict[str, list[Image.Image]]]:
    """Return the figures of each row of the page, and pictures to show."""
    judge = load_judge(TINY / "judge")
    prompts, scenes = prompts_and_scenes(SCENES)
    pictures = [draw(scene)[0] for scene in scenes]
    conditions = [edges(picture) for picture in pictures]
    names = {strength: f"with the network, strength {strength:g}" for strength in STRENGTHS} | {0.0: "the prompt alone"}
    drawn = {names[own]: draw_steered(base, network, prompts, conditions, own) for own in STRENGTHS}
    through = {
        "the true picture, through the VAE": [to_image(own) for own in through_vae(base.vae, to_tensor(pictures))]
    }
    rows = {}
    for name, images in {**drawn, **through}.items():
        agreed = [agreement(image, condition) for image, condition in zip(images, conditions, strict=True)]
        rows[name] = [float(np.mean(agreed)), *_right(judge, images, scenes)]
    shown = {"scene": pictures, "edges": conditions, **{names[own]: drawn[names[own]] for own in (0.0, 1.0)}}
    return rows, {name: images[:SHOWN] for name, images in shown.items()}


def _right(judge: torch.nn.Module, images: Sequence[Image.Image], scenes: list[Scene]) -> list[float]:
    """Return the share of pictures that the judge finds right, by label; colours where the scene has one."""
    right = verdicts(judge, to_tensor(images), scenes)
    named = {"colour": torch.tensor([scene.colour is not None for scene in scenes])}
    return [float(right[label][named.get(label, slice(None))].float().mean()) for label in LABELS]


def main() -> None:
    """Train, measure, and write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, help="folder of a run to measure, instead of training")
    network, base = parser.parse_args().network, load_base("tiny")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if network is None:
            (folder / "pictures").mkdir()
            write_pictures(folder / "pictures")
            network = train("control", base=base, images=folder / "pictures", output=folder / "run").folder
        rows, shown = measure(base, network)
    lines = [HEAD]
    for name, (agreed, *right) in rows.items():
        lines.append(f"| {name} | {agreed:.2f} | {' | '.join(f'{100 * share:.0f} %' for share in right)} |\n")
    save_image(grid(shown), PICTURE)
    write_text(PAGE, "".join([*lines, TAIL]))


if __name__ == "__main__":
    main()
