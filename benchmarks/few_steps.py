"""Pictures in four steps by an adapter of the recipe `few-steps`, judged: ``python -m benchmarks.few_steps``.

It draws 400 captioned pictures of the world, trains on them, and generates pictures of prompts of the world's grammar
in the ways of the page's table; the judge of `tiny` says whether thing, setting, style and colour are right. It takes
about five minutes on two cores.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.tiny_base import prompts_and_scenes, verdicts
from diffgraft.bases import load_base
from diffgraft.bases.loading import TINY
from diffgraft.bases.tiny.judge import LABELS, load_judge
from diffgraft.bases.tiny.train.pictures import SEED, scene_at
from diffgraft.bases.tiny.world import caption, draw
from diffgraft.files import write_text
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor
from diffgraft.trainers.run.train import train

PAGE = Path(__file__).parent / "results" / "few-steps.md"
PICTURES, FIRST = 400, 50_000
"""Number of training pictures, and index of the first scene"""
PROMPTS = 256
LCM = {"sampler": "lcm", "guidance": 1.0}
WAYS: dict[str, tuple[bool, DrawSettings]] = {
    "25 steps": (False, DrawSettings()),
    "4 steps": (False, DrawSettings(steps=4)),
    "4 steps by `lcm`, without guidance": (False, DrawSettings(steps=4, **LCM)),  # type: ignore[arg-type]
    "the same, with the adapter": (True, DrawSettings(steps=4, **LCM)),  # type: ignore[arg-type]
    "8 steps with the adapter": (True, DrawSettings(steps=8, **LCM)),  # type: ignore[arg-type]
}
"""Way of drawing → whether the adapter is in use, and settings"""
HEAD = f"""# Pictures in few steps

`python -m benchmarks.few_steps` wrote this page. The recipe `few-steps` was trained on {PICTURES} captioned pictures of
the world of `tiny`; {PROMPTS} prompts of its grammar were drawn, and the judge says which share is right. Each step
with guidance runs the denoiser on two samples. In brackets: as a share of the first row.

| | samples for a picture | {" | ".join(LABELS)} |
|{"-|" * (2 + len(LABELS))}
"""


def write_pictures(folder: Path) -> None:
    """Draw captioned pictures of the world into a folder."""
    for number in range(PICTURES):
        scene = scene_at(FIRST + number)
        draw(scene)[0].save(folder / f"{number:04d}.png")
        text = caption(scene, np.random.default_rng([SEED, 9, number]), setting_share=1)
        (folder / f"{number:04d}.txt").write_text(text, "utf-8")


def rows(folder: Path) -> dict[str, tuple[int, dict[str, float]]]:
    """Train, and return for each way the samples of a picture, and the share that the judge finds right by label."""
    base, judge = load_base("tiny"), load_judge(TINY / "judge")
    (folder / "pictures").mkdir()
    write_pictures(folder / "pictures")
    adapter = train("few-steps", base=base, images=folder / "pictures", output=folder / "run").adapter_file
    prompts, scenes = prompts_and_scenes(PROMPTS)
    found = {}
    for way, (has_adapter, settings) in WAYS.items():
        with Session(base) as session:
            if has_adapter:
                session.use(adapter)
            images = session.draw_each(prompts, range(PROMPTS), settings)
        right = verdicts(judge, to_tensor(images), scenes)
        named = {"colour": torch.tensor([scene.colour is not None for scene in scenes])}
        shares = {label: float(each[named.get(label, slice(None))].float().mean()) for label, each in right.items()}
        found[way] = (settings.steps * (1 if settings.guidance == 1 else 2), shares)
    return found


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder))
    _, first = next(iter(found.values()))
    lines = [HEAD]
    for way, (samples, shares) in found.items():
        cells = [f"{100 * share:.0f} % ({100 * share / first[label]:.0f} %)" for label, share in shares.items()]
        lines.append(f"| {way} | {samples} | {' | '.join(cells)} |\n")
    write_text(PAGE, "".join(lines))


if __name__ == "__main__":
    main()
