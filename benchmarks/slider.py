"""Pictures along an axis of the recipe `slider`, from night to day, judged: ``python -m benchmarks.slider``.

It trains the recipe, generates pictures of several things at strengths from −2 to 2, from the same noise, and has the
judge of `tiny` say whether they show night and the thing. It takes about three minutes on two cores.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffgraft.bases import load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from diffgraft.trainers.run.train import train

HERE = Path(__file__).parent
PAGE, SHEET = HERE / "results" / "slider.md", HERE / "pictures" / "slider.png"
THINGS = ("dog", "cat", "car", "house", "tree", "teapot")
EACH = 3
"""Number of pictures of each thing at each strength"""
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
HEAD = f"""# A slider from day to night

`python -m benchmarks.slider` wrote this page. The recipe `slider` was trained as it is: its target is "a dog", and its
axis goes from "a dog in the snow" to "a dog at night". At each strength, {EACH} pictures of each of {len(THINGS)}
things were generated from the same noise, by prompts such as "a cat" that name no place. The judge gives the
probabilities of night and snow, and the share in which the thing is right; brightness is a mean from 0 to 1.

| strength | night | snow | brightness | thing |
|-|-|-|-|-|
"""
TAIL = """
The axis was learned on dogs alone. It carries over to other things, though not to all of them: see the house.

![Six things at seven strengths, from a snowy day to night](../pictures/slider.png)
"""


def row(strength: float, pictures: Tensor, answers: dict[str, Tensor]) -> str:
    """Return a line of the table for pictures [n, 3, 64, 64] and the judge's logits for them."""
    chance = answers["setting"].softmax(1).mean(0)
    night, snow = (float(chance[LABELS["setting"].index(name)]) for name in ("night", "snow"))
    things = torch.tensor([LABELS["thing"].index(thing) for thing in THINGS * EACH])
    right = float((answers["thing"].argmax(1) == things).float().mean())
    bright = float(pictures.mean()) / 2 + 0.5
    return f"| {strength:g} | {100 * night:.0f} % | {100 * snow:.0f} % | {bright:.2f} | {100 * right:.0f} % |\n"


def draw(adapter: Path, strength: float) -> list[Image.Image]:
    """Generate the pictures of all things at a strength."""
    prompts = [f"a {thing}" for thing in THINGS * EACH]
    with Session(load_base("tiny")) as session:
        if strength:
            session.use(adapter, strength)
        return list(session.draw_each(prompts, range(len(prompts)), DrawSettings(batch=len(prompts))))


def table(adapter: Path, sheet: Path) -> Sequence[str]:
    """Return the lines of the table, and save the first pictures of each strength as `sheet`."""
    judge = load_judge(TINY / "judge")
    lines, shown = [], {}
    for strength in STRENGTHS:
        images = draw(adapter, strength)
        shown[f"strength {strength:g}"] = images[: len(THINGS)]
        pictures = to_tensor(images)
        with torch.no_grad():
            lines.append(row(strength, pictures, judge(pictures)))
    save_image(grid(shown), sheet)
    return lines


def main() -> None:
    """Measure, and write the page and its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = train("slider", base=load_base("tiny"), output=Path(folder) / "run").adapter_file
        lines = table(adapter, SHEET)
    write_text(PAGE, "".join([HEAD, *lines, TAIL]))


if __name__ == "__main__":
    main()
