"""Pictures by aesthetic embeddings of the styles of `tiny`, judged: ``python -m benchmarks.aesthetic``.

For each style an embedding is made of pictures in it. Prompts that name no style are drawn from the same noise with and
without it, at several settings; the judge of `tiny`, which shares nothing with the CLIP, says which style the pictures
show and whether the thing is right. It takes about three minutes on two cores.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny_base import PROMPTS_FROM, verdicts
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.aesthetic import AestheticOptions
from diffgraft.bases import Base, load_base
from diffgraft.bases.clip import load_clip
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.bases.tiny.train.pictures import SEED
from diffgraft.bases.tiny.world import Scene, draw, random_scene
from diffgraft.bases.tiny.world.scene import SETTING_WORDS
from diffgraft.data.aesthetic import Projection, aesthetic_adapter, projection_for
from diffgraft.files import write_text
from diffgraft.generation.plots import grid, save_image
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_image, to_tensor

PAGE = Path(__file__).parent / "results" / "aesthetic.md"
SHEET = Path(__file__).parent / "pictures" / "aesthetic.png"
STYLES = ("line", "pixel", "watercolour")
PICTURES, PROMPTS, SHOWN = 48, 32, 10
SETTINGS = ((5, 1e-4), (5, 1e-3), (20, 1e-3))
"""Steps and learning rate of Adam; the first are the defaults of webui's extension"""
DRAWN_WITH = (20, 1e-3)
"""Settings of the pictures that the page shows"""
HEAD = f"""# Aesthetic gradients

`python -m benchmarks.aesthetic` wrote this page. For each style of the world of `tiny`, an embedding was made of
{PICTURES} pictures in this style, by the CLIP of `tiny`. {PROMPTS} prompts that name a thing and a setting, but no
style, were drawn from the same noise with and without it. The judge, which shares nothing with the CLIP, says how many
pictures are in the style of the embedding, and in how many the thing is right; shares without an embedding are those of
the base.

"""


def write_pictures(folder: Path, style: str) -> Path:
    """Draw pictures in a style into a folder, and return it."""
    folder.mkdir()
    for number in range(PICTURES):
        rng = np.random.default_rng([SEED, 14, STYLES.index(style), number])
        draw(random_scene(rng, style=style))[0].save(folder / f"{number:03d}.png")
    return folder


def prompts_and_scenes() -> tuple[list[str], list[Scene]]:
    """Return prompts that name a thing and a setting, and their scenes in the style "flat"."""
    scenes = [random_scene(np.random.default_rng([PROMPTS_FROM, number]), style="flat") for number in range(PROMPTS)]
    places = [SETTING_WORDS[scene.setting][0].format(colour=scene.backdrop) for scene in scenes]
    names = [" ".join(filter(None, ("a", scene.colour, scene.thing))) for scene in scenes]
    return [f"{name} {place}" for name, place in zip(names, places, strict=True)], scenes


def drawn(base: Base, prompts: list[str], adapter: Adapter | None) -> Tensor:
    """Return a picture of each prompt, [n, 3, 64, 64] with values from -1 to 1; the noise is fixed."""
    with Session(base) as session:
        if adapter is not None:
            session.use(adapter)
        return to_tensor(session.draw_each(prompts, range(len(prompts)), DrawSettings(batch=32)))


def remark(projection: Projection, seconds: float) -> str:
    """Return sentences on the projection and the time."""
    steps, rate = DRAWN_WITH
    return (
        "\nThe projection from the text encoder of `tiny` to its CLIP was fitted on captions of the world; on captions "
        "that were left\nout, projected and true embeddings have a cosine of "
        f"{projection.cosine:.3f}. With {steps} steps a prompt takes {seconds:.2f} s more than without.\n"
        f"\n![Ten prompts: the base, and each style at {steps} steps with a learning rate of {rate:g}]"
        "(../pictures/aesthetic.png)\n"
    )


def main() -> None:
    """Measure, and write the page and its pictures."""
    base, clip, judge = load_base("tiny"), load_clip("tiny"), load_judge(TINY / "judge")
    projection = projection_for(clip, base)
    prompts, scenes = prompts_and_scenes()

    def shares(pictures: Tensor, style: str) -> tuple[float, float]:
        with torch.no_grad():
            is_style = judge(pictures)["style"].argmax(1) == LABELS["style"].index(style)
        return float(is_style.float().mean()), float(verdicts(judge, pictures, scenes)["thing"].float().mean())

    start = time.perf_counter()
    before = drawn(base, prompts, None)
    plain = time.perf_counter() - start
    rows = {"base": before[:SHOWN]}
    cells = {setting: [] for setting in (None, *SETTINGS)}  # type: dict[tuple[int, float] | None, list[str]]
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for style in STYLES:
            source = write_pictures(Path(folder) / style, style)
            for setting in cells:
                pictures = before
                if setting is not None:
                    options = AestheticOptions(steps=setting[0], learning_rate=setting[1])
                    start = time.perf_counter()
                    pictures = drawn(base, prompts, aesthetic_adapter(source, clip, projection, options, base))
                    if setting == DRAWN_WITH:
                        seconds = (time.perf_counter() - start - plain) / PROMPTS
                        rows[style] = pictures[:SHOWN]
                own, thing = shares(pictures, style)
                cells[setting].append(f"{100 * own:.0f} % ({100 * thing:.0f} %)")
    lines = [f"| steps, learning rate | {' | '.join(f'{style} (thing)' for style in STYLES)} |\n|-|-|-|-|\n"]
    for setting, row in cells.items():
        name = "without" if setting is None else f"{setting[0]}, {setting[1]:g}"
        lines.append(f"| {name} | {' | '.join(row)} |\n")
    save_image(grid({name: [*map(to_image, pictures)] for name, pictures in rows.items()}), SHEET)
    write_text(PAGE, "".join([HEAD, *lines, remark(projection, seconds)]))


if __name__ == "__main__":
    main()
