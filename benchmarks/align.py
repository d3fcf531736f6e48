"""Pictures by an adapter of the recipe `align`, judged: ``python -m benchmarks.align``.

The recipe is trained on captioned pictures of the world of `tiny`, with its CLIP. Pictures are then drawn by prompts of
other scenes, from the same noise with and without the adapter. The CLIP scores them, and so does the judge of `tiny`,
which shares nothing with the CLIP and was not asked in training. It takes about four minutes on two cores.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny_base import prompts_and_scenes, verdicts, wilson
from benchmarks.tiny_clip import features
from diffgraft.bases import load_base
from diffgraft.bases.clip import load_clip
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import load_judge
from diffgraft.bases.tiny.train.pictures import SEED, scene_at
from diffgraft.bases.tiny.world import caption, draw
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_image, to_tensor
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "align.md"
SHEET = Path(__file__).parent / "pictures" / "align.png"
PICTURES, FIRST = 200, 70_000
"""Number of training pictures, and index of their first scene"""
PROMPTS, SHOWN = 96, 12
PRIORS = (1.0, 10.0)
"""Values of `loss.options.prior` that are compared"""
KINDS = ("thing", "setting", "style")
HEAD = f"""# Alignment

`python -m benchmarks.align` wrote this page. The recipe `align` was trained on {PICTURES} captioned pictures of the
world of `tiny`, with its CLIP, at two weights of the distance from the base (`loss.options.prior`; the recipe has
{PRIORS[1]:g}). {PROMPTS} pictures were drawn by prompts of other scenes, from the same noise with and without the
adapter. "CLIP" is the mean cosine of picture and prompt by the CLIP that the adapter was trained with. The judge shares
nothing with it and was not asked in training: it says in how many pictures thing, setting and style are right, with the
interval of 95 % for the style.

| | CLIP | thing | setting | style |
|-|-|-|-|-|
"""
TAIL = f"""
For comparison, the CLIP gives pictures of the world itself with these prompts {{world:.3f}}: the base already scores as
high as what it was trained on, so that there was nothing left to gain on its own prompts, and the adapter hardly
changed the pictures. The judge does not find them better. Tests show that the step computes what it should; that it
helps a base is not shown here.

![{SHOWN} prompts: the base above, with the recipe's adapter below](../pictures/align.png)
"""


def write_pictures(folder: Path) -> None:
    """Draw captioned pictures into a folder."""
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        scene = scene_at(FIRST + number)
        draw(scene)[0].save(folder / f"{number:04d}.png")
        text = caption(scene, np.random.default_rng([SEED, 13, number]), setting_share=1)
        (folder / f"{number:04d}.txt").write_text(text, "utf-8")


def drawn(prompts: list[str], adapter: Path | None) -> Tensor:
    """Return a picture of each prompt, [n, 3, 64, 64] with values from -1 to 1; the noise is fixed."""
    with Session(load_base("tiny")) as session:
        if adapter is not None:
            session.use(adapter)
        return to_tensor(session.draw_each(prompts, range(len(prompts)), DrawSettings(batch=32)))


def main() -> None:
    """Measure, and write the page and its pictures."""
    prompts, scenes = prompts_and_scenes(PROMPTS)
    clip, judge = load_clip("tiny"), load_judge(TINY / "judge")
    with torch.no_grad():
        texts = clip.text_features(prompts)

    def row(name: str, pictures: Tensor) -> str:
        right = {kind: int(found.sum()) for kind, found in verdicts(judge, pictures, scenes).items()}
        low, high = wilson(right["style"], PROMPTS)
        shares = " | ".join(f"{100 * right[kind] / PROMPTS:.0f} %" for kind in KINDS)
        score = float((features(clip, pictures) * texts).sum(-1).mean())
        return f"| {name} | {score:.3f} | {shares} ({100 * low:.0f} to {100 * high:.0f}) |\n"

    before = drawn(prompts, None)
    lines = [row("the base", before)]
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "pictures")
        for prior in PRIORS:
            run = train(
                "align",
                base=load_base("tiny"),
                images=Path(folder) / "pictures",
                output=Path(folder) / f"run-{prior:g}",
                **{"loss.options.prior": prior},
            )
            after = drawn(prompts, run.adapter_file)
            lines.append(row(f"prior={prior:g}", after))
            if prior == PRIORS[1]:
                rows = {"base": before[:SHOWN], "adapter": after[:SHOWN]}
                save_image(grid({name: [*map(to_image, part)] for name, part in rows.items()}), SHEET)
    world = float((features(clip, to_tensor([draw(scene)[0] for scene in scenes])) * texts).sum(-1).mean())
    write_text(PAGE, "".join([HEAD, *lines, TAIL.format(world=world)]))


if __name__ == "__main__":
    main()
