"""Quality of the embedded base `tiny`, by its judge: ``python -m benchmarks.tiny_base`` measures it.

256 pictures are generated from prompts of the world's grammar (25 steps, fixed seeds); the judge decides whether thing,
setting and style are right. Because the judge makes errors too, each share is also given relative to the judge's
accuracy on unseen pictures of the world that went through the VAE. With ``--photos FOLDER``, the VAE is also measured
on photographs.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgraft.bases.loading import TINY, load_base
from diffgraft.bases.tiny.judge import LABELS, Judge, labels_of, load_judge
from diffgraft.bases.tiny.train.pictures import SEED, UNSEEN, scene_at
from diffgraft.bases.tiny.world import Scene, caption, draw
from diffgraft.data.pictures import crop_to_square, upright_rgb
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.pixels import to_tensor

PROMPTS_FROM = 2 * UNSEEN
"""Index of the first scene that a prompt is made from"""


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share `right` / `n` (Wilson 1927, score interval)."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
    """Return for each kind of label which of the pictures [n, 3, 64, 64] the judge finds right, a bool tensor [n]."""
    right = torch.tensor([labels_of(scene) for scene in scenes])
    answers = judge(pictures)
    return {kind: answers[kind].argmax(1) == right[:, i] for i, kind in enumerate(LABELS)}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each picture, [n]; pixel values are in -1..1."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


@torch.no_grad()
def through_vae(vae: Any, x: Tensor) -> Tensor:
    """Return the pictures `x` [n, 3, h, w] after encoding and decoding, clamped to -1..1."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(64)]
    return torch.cat(parts)


def prompts_and_scenes(count: int) -> tuple[list[str], list[Scene]]:
    """Return prompts of the grammar, which name the setting, and the scenes that they describe."""
    scenes = [scene_at(PROMPTS_FROM + number) for number in range(count)]
    rngs = [np.random.default_rng([SEED, 3, number]) for number in range(count)]
    return [caption(scene, rng, setting_share=1) for scene, rng in zip(scenes, rngs, strict=True)], scenes


def measure(count: int = 256, folder: Path = TINY, photos: Path | None = None) -> dict[str, Any]:
    """Return all figures for the model card."""
    base, judge = load_base(folder), load_judge(folder / "judge")
    unseen = [scene_at(UNSEEN + index) for index in range(1000)]
    x = to_tensor([draw(scene)[0] for scene in unseen])
    y = through_vae(base.vae, x)
    report: dict[str, Any] = {"vae": {"world dB": float(psnr(x, y).mean()), "n": len(x)}}
    if photos:
        p = to_tensor([crop_to_square(upright_rgb(path), 64) for path in sorted(photos.rglob("*.jpg"))])
        report["vae"] |= {"photographs dB": float(psnr(p, through_vae(base.vae, p)).mean()), "photographs": len(p)}
    own, passed = verdicts(judge, x, unseen), verdicts(judge, y, unseen)

    prompts, scenes = prompts_and_scenes(count)
    start = time.perf_counter()
    images = Session(base).draw_each(
        prompts, range(count), DrawSettings(batch=32), phase_title="generating for the judge"
    )
    report["seconds for 16 pictures"] = 16 * (time.perf_counter() - start) / count
    drawn = verdicts(judge, to_tensor(images), scenes)
    for kind in LABELS:
        named = torch.tensor([kind != "colour" or scene.colour is not None for scene in scenes])
        right, n = int(drawn[kind][named].sum()), int(named.sum())
        report[kind] = {
            "right": right / n,
            "n": n,
            "95 % interval": wilson(right, n),
            "judge on unseen": float(own[kind].float().mean()),
            "judge through VAE": float(passed[kind].float().mean()),
            "relative": right / n / float(passed[kind].float().mean()),
        }
    return report


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--photos", type=Path)
    options = parser.parse_args()
    print(json.dumps(measure(options.count, options.folder, options.photos), indent=1))


if __name__ == "__main__":
    main()
