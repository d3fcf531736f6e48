"""Subjects of the world of `tiny` that the predictor is trained on: made-up creatures, and glyphs under any noun."""

import multiprocessing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from diffgraft.bases.tiny.train.fit import fingerprint
from diffgraft.bases.tiny.train.pictures import SEED, to_tensor
from diffgraft.bases.tiny.train.samples import rare_words, tokens
from diffgraft.bases.tiny.train.work_folder import read_tensors, write_tensors
from diffgraft.bases.tiny.world.broad import NAMED_CREATURES, nouns
from diffgraft.bases.tiny.world.creatures import NOUNS, creature, noun_of
from diffgraft.bases.tiny.world.glyphs import glyph_names, glyph_sprite
from diffgraft.bases.tiny.world.scene import caption, draw, random_scene
from diffgraft.bases.tiny.world.things import COLOURS, THINGS, recolour

VIEWS = 8
"""Pictures of each subject, in different settings."""
CHUNK = 128
"""Number of subjects in one file."""
_FIRST = 2**41
"""Number of the first made-up creature here; the denoiser has seen none of them."""
_FLAT = 0.85
"""Share of pictures in the flat style; five pictures of a subject usually have one style."""


@dataclass(frozen=True)
class Subjects:
    """Drawn and encoded pictures of n subjects."""

    pictures: Tensor
    """uint8 [n, views, 64, 64, 3]"""
    latents: Tensor
    """Mean latents, unscaled, float16 [n, views, 4, 16, 16]"""
    masks: Tensor
    """Share of the subject in each latent's pixels, uint8 of 255, [n, views, 16, 16]"""
    ids: Tensor
    """Token ids of a caption with a rare word, [n, views, length]"""
    class_ids: Tensor
    """Token ids of the same caption without the rare word, [n, views, length]"""


def draw_subjects(work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, processes: int = 1) -> Subjects:
    """Draw and encode `count` subjects, or read those that are in `work` already."""
    folder = work / "subjects"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    paths = [folder / f"{fingerprint(vae)}-{numbers.start}-{len(numbers)}.pt" for numbers in chunks]
    missing = [(path, numbers) for path, numbers in zip(paths, chunks, strict=True) if not path.exists()]
    draw, title, done = partial(_save_chunk, vae, tokenizer), "drawing subjects", len(chunks) - len(missing)
    if processes > 1 and len(missing) > 1:
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as workers:
            for _ in tqdm(workers.imap(draw, missing), title, len(chunks), initial=done):
                pass
    else:
        for job in tqdm(missing, title, len(chunks), initial=done):
            draw(job)
    names = [field.name for field in fields(Subjects)]
    parts = [read_tensors(path, names) for path in paths]
    return Subjects(**{name: torch.cat([part[name] for part in parts]) for name in names})


def _save_chunk(vae: AutoencoderKL, tokenizer: CLIPTokenizer, job: tuple[Path, range]) -> None:
    """Draw and save the subjects with these numbers."""
    path, numbers = job
    rare = rare_words(tokenizer)[NAMED_CREATURES:]
    drawn = [_draw_subject(number, rare) for number in numbers]
    pictures = torch.from_numpy(np.stack([pictures for pictures, *_ in drawn]))
    shape = pictures.shape[:2]
    with torch.no_grad():
        latents = [vae.encode(to_tensor(views.numpy())).latent_dist.mean.half() for views in pictures]
    words = [tokens(tokenizer, [text for row in drawn for text in row[place]]).view(*shape, -1) for place in (2, 3)]
    held = {
        "pictures": pictures,
        "latents": torch.stack(latents),
        "masks": torch.from_numpy(np.stack([masks for _, masks, *_ in drawn])),
        "ids": words[0],
        "class_ids": words[1],
    }
    write_tensors(path, held)


def _draw_subject(number: int, rare: list[str]) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Return pictures [views, 64, 64, 3], masks [views, 16, 16], and captions with and without the rare word."""
    rng = np.random.default_rng([SEED, 7, number])
    cutout, noun = _appearance(rng, number)
    word, style = str(rng.choice(rare)), "flat" if rng.random() < _FLAT else None
    pictures, masks, texts, plain = [], [], [], []
    for _ in range(VIEWS):
        scene = random_scene(rng)
        scene = replace(
            scene,
            thing=noun,
            colour=None,
            glyph=None,
            style=style or scene.style,
            size=float(rng.uniform(0.55, 0.86)),
            x=float(0.5 + rng.uniform(-0.12, 0.12)),
            y=float(0.54 + rng.uniform(-0.1, 0.1)),
            tilt=float(np.clip(rng.normal(0, 8), -20, 20)),
        )
        picture, mask = draw(scene, cutout)
        pictures.append(np.asarray(picture))
        masks.append(np.asarray(mask.resize((16, 16), Image.Resampling.BOX)))
        seed = int(rng.integers(2**31))
        texts.append(caption(scene, np.random.default_rng(seed), word))
        plain.append(caption(scene, np.random.default_rng(seed)))
    return np.stack(pictures), np.stack(masks), texts, plain


def _appearance(rng: np.random.Generator, number: int) -> tuple[Image.Image, str]:
    """Return the cut-out of a subject and its class noun: half are creatures, half glyphs, at times recoloured."""
    if rng.random() < 0.5:
        return creature(_FIRST + number)[1], noun_of(_FIRST + number)
    names = glyph_names()
    name = list(names)[int(rng.integers(len(names)))]
    cutout = glyph_sprite(str(rng.choice(names[name])))
    if rng.random() < 0.4:
        cutout = Image.fromarray(recolour(np.asarray(cutout), COLOURS[str(rng.choice(list(COLOURS)))]))
    kinds: tuple[tuple[str, ...], ...] = (NOUNS, tuple(THINGS), nouns())
    return cutout, str(rng.choice(kinds[int(rng.integers(len(kinds)))]))
