"""Stage 5: the denoiser, on stored latents and the text encoder's states.

v-prediction on a schedule that ends in pure noise (Lin et al. 2023, arXiv:2305.08891): with Stable Diffusion's own
end the picture's mean survives in the last step, and a model this small reads the setting from it, not from the words.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from diffgraft.bases.tiny.train.fit import Plan, fit
from diffgraft.bases.tiny.train.samples import END, LENGTH, START, WORDINGS, padded
from diffgraft.bases.tiny.train.text import WIDTH


def new_unet() -> UNet2DConditionModel:
    """The denoiser, untrained.

    It is widest at 4 × 4, where a step costs least and the layout of a picture is decided. Attention at 16 × 16 was
    tried and left out: adapters drew no better outlines with it, and steps took 1.4 to 1.8 times as long.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
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


def timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Half of them uniform, half around t = 600: that is where things take their outlines, the slowest lesson."""
    middle = np.clip(rng.normal(600, 130, count), 0, 999).astype(np.int64)
    return np.where(rng.random(count) < 0.5, rng.integers(0, 1000, count), middle)


def train_unet(work: Path, z: Tensor, ids: Tensor, text_encoder: CLIPTextModel, plan: Plan) -> UNet2DConditionModel:
    """Train on `z` [n, 4, 16, 16], latents scaled to unit spread, and the ids [n, wordings, `LENGTH`] of captions."""
    torch.manual_seed(4)
    unet = new_unet()
    unet.set_attn_processor(AttnProcessor())  # on processors, the fused kernel's backward pass takes thrice as long
    alphas = new_scheduler().alphas_cumprod
    nothing = torch.full((LENGTH,), END, dtype=ids.dtype)
    nothing[0] = START

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([4, step])
        rows, wording = rng.integers(0, len(z), plan.batch), rng.integers(0, WORDINGS, plan.batch)
        x, batch = z[rows].float(), ids[rows, wording]
        batch[rng.random(plan.batch) < 0.1] = nothing
        times = torch.from_numpy(timesteps(rng, plan.batch))
        a = alphas[times].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                words = text_encoder(input_ids=padded(batch)).last_hidden_state
            guess = unet(noisy, times, words).sample
        total: Tensor = (guess.float() - v).square().mean()
        return total

    fit("unet", unet, loss, plan, work)
    return unet
