"""Stage 5 of the training: the denoiser, trained on stored latents and the text encoder's hidden states.

The denoiser uses v-prediction and a schedule with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891). With Stable
Diffusion's original schedule the last timestep still reveals the picture's mean, and a model this small infers the
setting from that mean instead of the prompt.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffgraft.bases.tiny.train.fit import autocast
from diffgraft.bases.tiny.train.samples import END, LENGTH, START, WORDINGS, pad_ids
from diffgraft.bases.tiny.train.text import WIDTH


def new_unet() -> UNet2DConditionModel:
    """Create the untrained denoiser.

    It has no attention at 16 × 16 and is no wider at 4 × 4 than at 8 × 8: in trials, neither improved the outlines
    that adapters draw, and steps took 1.3 to 1.8 times as long.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Create the noise scheduler of the base: zero terminal SNR, v-prediction and trailing timesteps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )


@cache
def _alphas_cumprod() -> Tensor:
    """Return ᾱ of each timestep, [1000]."""
    alphas: Tensor = new_scheduler().alphas_cumprod
    return alphas


_EMPTY_PROMPT = torch.tensor([START] + [END] * (LENGTH - 1))


def timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw `count` timesteps, half uniform and half around t = 600, where outlines form, which are learned slowest."""
    middle = np.clip(rng.normal(600, 130, count), 0, 999).astype(np.int64)
    return np.where(rng.random(count) < 0.5, rng.integers(0, 1000, count), middle)


def caption_batch(ids: Tensor, rng: np.random.Generator, rows: np.ndarray) -> Tensor:
    """Return the token ids of one caption of each picture in `rows` [n], [n, `LENGTH`]; one in ten is empty.

    Args:
        ids: Caption token ids [pictures, wordings, `LENGTH`].
        rng: Generator that chooses.
        rows: Numbers of the pictures.
    """
    wording = rng.integers(0, WORDINGS, len(rows))
    batch = ids[rows, wording]
    batch[rng.random(len(rows)) < 0.1] = _EMPTY_PROMPT.to(batch.dtype)
    return batch


@dataclass(frozen=True)
class UNetStage:
    """Training of the denoiser on latents and captions."""

    z: Tensor
    """Latents [n, 4, 16, 16], scaled to a standard deviation of 1"""
    ids: Tensor
    """Caption token ids [n, wordings, `LENGTH`]"""
    text_encoder: CLIPTextModel
    """Trained text encoder; it stays frozen"""
    inputs: str = ""
    name: str = "unet"

    def new_model(self) -> UNet2DConditionModel:
        """Create the untrained denoiser."""
        torch.manual_seed(4)
        unet = new_unet()
        unet.set_attn_processor(AttnProcessor())  # on CPUs, the fused kernel's backward pass takes three times as long
        return unet

    def loss(self, model: nn.Module, count: int, seed: tuple[int, int]) -> Tensor:
        """Return the mean loss of `count` pictures; `seed` (step, process) decides pictures, noise and timesteps."""
        rng = np.random.default_rng([4, *seed])
        rows = rng.integers(0, len(self.z), count)
        batch, x = caption_batch(self.ids, rng, rows), self.z[rows].float()
        times = torch.from_numpy(timesteps(rng, count))
        a = _alphas_cumprod()[times].view(-1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with autocast():
            with torch.no_grad():
                embeddings = self.text_encoder(input_ids=pad_ids(batch)).last_hidden_state
            prediction = model(noisy, times, embeddings).sample
        total: Tensor = (prediction.float() - v).square().mean()
        return total
