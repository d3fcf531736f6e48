"""Stage 4 of the training: the denoiser's pictures, drawn in chunks and stored as latents and caption token ids."""

import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from diffgraft.bases.tiny.train.fit import autocast, fingerprint
from diffgraft.bases.tiny.train.pictures import to_tensor
from diffgraft.bases.tiny.train.samples import LENGTH, WORDINGS, captions_of, rare_words, sample_at, tokens
from diffgraft.bases.tiny.train.work_folder import read_tensors, write_tensors

CHUNK = 2048
"""Number of pictures in one file of the pool."""
_AT_ONCE = 256
"""Number of pictures encoded in one batch."""


def draw_pool(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, processes: int = 1
) -> tuple[Tensor, Tensor]:
    """Return mean latents, unscaled, float16 [count, 4, 16, 16], and caption token ids [count, wordings, `LENGTH`].

    Each chunk is a separate file in ``work/pool``, named by a hash of the autoencoder's weights, so that interrupted
    drawing resumes at the first missing chunk; `processes` draw chunks at the same time, one thread each.
    """
    folder, vae_hash = work / "pool", fingerprint(vae)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    paths = [folder / f"{vae_hash}-{numbers.start}-{len(numbers)}.pt" for numbers in chunks]
    missing = [(path, numbers) for path, numbers in zip(paths, chunks, strict=True) if not path.exists()]
    draw = partial(_save_chunk, vae, tokenizer)
    title = "drawing and encoding pictures"
    if processes > 1 and len(missing) > 1:
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as workers:
            for _ in tqdm(workers.imap(draw, missing), title, len(chunks), initial=len(chunks) - len(missing)):
                pass
    else:
        for job in tqdm(missing, title, len(chunks), initial=len(chunks) - len(missing)):
            draw(job)
    loaded = [read_tensors(path, ("latents", "ids")) for path in paths]
    return torch.cat([chunk["latents"] for chunk in loaded]), torch.cat([chunk["ids"] for chunk in loaded])


def _save_chunk(vae: AutoencoderKL, tokenizer: CLIPTokenizer, job: tuple[Path, range]) -> None:
    """Draw and save one chunk: its file, and the numbers of its samples."""
    path, numbers = job
    write_tensors(path, _draw_chunk(numbers, vae, tokenizer))


@torch.no_grad()
def _draw_chunk(numbers: range, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """Return the latents and the caption token ids of the samples with these numbers."""
    words = rare_words(tokenizer)
    samples = [sample_at(number, words) for number in numbers]
    latents = []
    for start in range(0, len(samples), _AT_ONCE):
        drawn = np.stack([np.asarray(sample.draw()) for sample in samples[start : start + _AT_ONCE]])
        with autocast():
            latents.append(vae.encode(to_tensor(drawn)).latent_dist.mean.half())
    texts = [text for sample, number in zip(samples, numbers, strict=True) for text in captions_of(sample, number)]
    return {"latents": torch.cat(latents), "ids": tokens(tokenizer, texts).view(-1, WORDINGS, LENGTH)}
