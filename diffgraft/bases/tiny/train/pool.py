"""Stage 4 of the training: the denoiser's pictures, drawn in chunks and stored as latents and caption token ids."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from diffgraft.bases.tiny.train.fit import fingerprint
from diffgraft.bases.tiny.train.pictures import to_tensor
from diffgraft.bases.tiny.train.samples import LENGTH, WORDINGS, captions_of, rare_words, sample_at, tokens

CHUNK = 2048
"""Number of pictures in one file of the pool."""
_AT_ONCE = 256
"""Number of pictures encoded in one batch."""


@torch.no_grad()
def _draw_chunk(numbers: range, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """Return the latents and the caption token ids of the samples with these numbers."""
    words = rare_words(tokenizer)
    samples = [sample_at(number, words) for number in numbers]
    latents = []
    for start in range(0, len(samples), _AT_ONCE):
        drawn = np.stack([np.asarray(sample.draw()) for sample in samples[start : start + _AT_ONCE]])
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(to_tensor(drawn)).latent_dist.mean.half())
    texts = [text for sample, number in zip(samples, numbers, strict=True) for text in captions_of(sample, number)]
    return {"latents": torch.cat(latents), "ids": tokens(tokenizer, texts).view(-1, WORDINGS, LENGTH)}


def draw_pool(work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """Return mean latents, unscaled, float16 [count, 4, 16, 16], and caption token ids [count, wordings, `LENGTH`].

    Each chunk is a separate file in ``work/pool``, named by a hash of the autoencoder's weights, so that interrupted
    drawing resumes at the first missing chunk.
    """
    folder, vae_hash = work / "pool", fingerprint(vae)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in tqdm(range(0, count, CHUNK), "drawing and encoding pictures", mininterval=5):
        numbers = range(start, min(start + CHUNK, count))
        path = folder / f"{vae_hash}-{numbers.start}-{len(numbers)}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(_draw_chunk(numbers, vae, tokenizer), partial)
            partial.replace(path)
        chunks.append(torch.load(path, weights_only=True))
    return torch.cat([chunk["latents"] for chunk in chunks]), torch.cat([chunk["ids"] for chunk in chunks])
