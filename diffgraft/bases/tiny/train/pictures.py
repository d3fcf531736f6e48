"""Training pictures, drawn once in parallel on all CPU cores and stored as one array on disk."""

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from diffgraft.bases.tiny.train.work_folder import read_pictures
from diffgraft.bases.tiny.world import Scene, draw, random_scene

SEED = 20260
CHUNK = 500
UNSEEN = 10_000_000
"""First scene index that is reserved for evaluation; no stage is trained on scenes from this index on."""


def scene_at(index: int) -> Scene:
    """Return the random scene number `index`; the same index always gives the same scene."""
    return random_scene(np.random.default_rng([SEED, index]))


def leaves(index: int) -> Image.Image:
    """Draw dead-leaves picture number `index`: overlapping textured patches of all sizes, RGB, 64 × 64.

    Dead-leaves pictures have the statistics of photographs (Lee, Mumford and Huang 2001, "Occlusion models for natural
    images"); the VAE is trained on them beside the world's pictures so that it also reconstructs photographs.
    """
    rng = np.random.default_rng([SEED, 1, index])
    side = 128
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(0, 256, 3)))
    tone, spread = rng.uniform(40, 215, 3), rng.uniform(15, 80)
    for _ in range(int(rng.integers(30, 120))):
        radius = min(4 / rng.random() ** 0.6, 70)
        x, y = rng.uniform(0, side, 2)
        ends = np.clip(rng.normal(tone, spread, (2, 3)), 0, 255)
        size = max(2, int(2 * radius))
        ramp = np.linspace(0, 1, size)[:, None, None]
        patch = np.broadcast_to(ends[0] * (1 - ramp) + ends[1] * ramp, (size, size, 3)).copy()
        cells = int(rng.integers(2, 9))
        grain = Image.fromarray(rng.normal(0, rng.uniform(0, 40), (cells, cells)).astype(np.float32))
        patch += np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC))[..., None]
        leaf = Image.fromarray(np.clip(patch, 0, 255).astype(np.uint8)).rotate(float(rng.uniform(0, 360)))
        mask = Image.new("L", leaf.size)
        corners = rng.uniform(0.35, 0.5, 7) * size
        angles = np.linspace(0, 2 * np.pi, 7, endpoint=False)
        outline = [(size / 2 + r * np.cos(a), size / 2 + r * np.sin(a)) for r, a in zip(corners, angles, strict=True)]
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        canvas.paste(leaf, (int(x - radius), int(y - radius)), mask)
    return canvas.resize((64, 64), Image.Resampling.BOX)


def _chunk(job: tuple[str, int, int]) -> np.ndarray:
    """Draw the pictures of one job (kind, start index, stop index), uint8 [stop - start, 64, 64, 3]."""
    kind, start, stop = job
    make = leaves if kind == "leaves" else lambda index: draw(scene_at(index))[0]
    return np.stack([np.asarray(make(index)) for index in range(start, stop)])


def pictures(work: Path, kind: str, count: int, start: int = 0) -> np.ndarray:
    """Return pictures of `kind` ("world" or "leaves"), uint8 [count, 64, 64, 3], from disk or newly drawn."""
    path = work / f"{kind}-{start}-{count}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, 64, 64, 3))
        jobs = [(kind, first, min(first + CHUNK, start + count)) for first in range(start, start + count, CHUNK)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            chunks = tqdm(pool.imap(_chunk, jobs), f"drawing {kind}", total=len(jobs))
            for number, chunk in enumerate(chunks):
                out[number * CHUNK : (number + 1) * CHUNK] = chunk
        out.flush()
        partial.rename(path)
    return read_pictures(path, count)


def to_tensor(batch: np.ndarray) -> Tensor:
    """Convert pictures uint8 [n, h, w, 3] to float32 [n, 3, h, w] in -1..1, in channels-last memory format."""
    return torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
