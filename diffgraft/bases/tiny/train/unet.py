"""Stage 4: the denoiser, on cached latents and cached text states.

v-prediction on a schedule that ends in pure noise (Lin et al. 2023, arXiv:2305.08891): with Stable Diffusion's own
end the picture's mean survives in the last step, and a model this small reads the setting from it, not from the words.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm import tqdm

from diffgraft.bases.tiny.train.fit import Plan, fingerprint, fit
from diffgraft.bases.tiny.train.pictures import to_tensor
from diffgraft.bases.tiny.train.text import WIDTH, WORDINGS


def new_unet() -> UNet2DConditionModel:
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


@torch.no_grad()
def latents(work: Path, vae: AutoencoderKL, world: np.ndarray) -> Tensor:
    """Mean latents of all pictures, unscaled, float16 [count, 4, 16, 16]."""
    path = work / f"latents-{len(world)}-{fingerprint(vae)}.pt"
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    out = []
    for start in tqdm(range(0, len(world), 250), "encoding pictures"):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(vae.encode(to_tensor(world[start : start + 250])).latent_dist.mean.half())
    kept = torch.cat(out)
    torch.save(kept, path)
    return kept


def timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Half of them uniform, half around t = 600: that is where things take their outlines, the slowest lesson."""
    middle = np.clip(rng.normal(600, 130, count), 0, 999).astype(np.int64)
    return np.where(rng.random(count) < 0.5, rng.integers(0, 1000, count), middle)


def train_unet(work: Path, z: Tensor, states: Tensor, empty: Tensor, plan: Plan) -> UNet2DConditionModel:
    """`z` [n, 4, 16, 16] scaled to unit spread, `states` [n, wordings, 77, width], `empty` [77, width]."""
    torch.manual_seed(4)
    unet = new_unet()
    unet.set_attn_processor(AttnProcessor())  # on processors, the fused kernel's backward pass takes thrice as long
    alphas = new_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([4, step])
        rows, wording = rng.integers(0, len(z), plan.batch), rng.integers(0, WORDINGS, plan.batch)
        x = z[rows].float()
        words = states[rows, wording].float()
        words[rng.random(plan.batch) < 0.1] = empty
        times = torch.from_numpy(timesteps(rng, plan.batch))
        a = alphas[times].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with torch.autocast("cpu", torch.bfloat16):
            guess = unet(noisy, times, words).sample
        total: Tensor = (guess.float() - v).square().mean()
        return total

    fit("unet", unet, loss, plan, work)
    return unet
