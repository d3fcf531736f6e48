"""Stage 5 of the training: the denoiser, trained on stored latents and the text encoder's hidden states.

The denoiser uses v-prediction and a schedule with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891). With Stable
Diffusion's original schedule the last timestep still reveals the picture's mean, and a model this small infers the
setting from that mean instead of the prompt.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import CLIPTextModel

from diffgraft.bases.tiny.train.fit import StagePlan, autocast, fit
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


_EMPTY_PROMPT = torch.tensor([START] + [END] * (LENGTH - 1))


def timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw `count` timesteps, half uniform and half around t = 600, where outlines form, which are learned slowest."""
    middle = np.clip(rng.normal(600, 130, count), 0, 999).astype(np.int64)
    return np.where(rng.random(count) < 0.5, rng.integers(0, 1000, count), middle)


def train_unet(
    work: Path,
    z: Tensor,
    ids: Tensor,
    text_encoder: CLIPTextModel,
    plan: StagePlan,
    processes: int = 1,
    compiled: bool = False,
) -> UNet2DConditionModel:
    """Train the denoiser, or resume from the checkpoint in `work`.

    Args:
        work: Folder for the checkpoint.
        z: Latents [n, 4, 16, 16], scaled to a standard deviation of 1.
        ids: Caption token ids [n, wordings, `LENGTH`].
        text_encoder: Trained text encoder; it stays frozen.
        plan: Training schedule.
        processes: Number of processes that share each batch, one thread each.
        compiled: Whether `torch.compile` translates the denoiser first, which takes minutes and shortens each step.
    """
    data = DenoiserData(z, ids, text_encoder, new_scheduler().alphas_cumprod)
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            address = f"file://{folder}/rendezvous"
            spawn(_share_training, (processes, address, work, data, plan, compiled), processes)  # type: ignore[no-untyped-call]
    return _train(work, data, plan, compiled=compiled)  # after other processes have trained it, this loads their checkpoint


@dataclass(frozen=True)
class DenoiserData:
    """Training data of the denoiser."""

    z: Tensor
    """Latents [n, 4, 16, 16], scaled to a standard deviation of 1"""
    ids: Tensor
    """Caption token ids [n, wordings, `LENGTH`]"""
    text_encoder: CLIPTextModel
    alphas_cumprod: Tensor
    """ᾱ of each timestep, [1000]"""

    def loss(self, unet: UNet2DConditionModel, count: int, seed: tuple[int, int]) -> Tensor:
        """Return the mean loss of `count` pictures; `seed` (step, process) decides pictures, noise and timesteps."""
        rng = np.random.default_rng([4, *seed])
        rows, wording = rng.integers(0, len(self.z), count), rng.integers(0, WORDINGS, count)
        x, batch = self.z[rows].float(), self.ids[rows, wording]
        batch[rng.random(count) < 0.1] = _EMPTY_PROMPT.to(batch.dtype)
        times = torch.from_numpy(timesteps(rng, count))
        a = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        with autocast():
            with torch.no_grad():
                embeddings = self.text_encoder(input_ids=pad_ids(batch)).last_hidden_state
            prediction = unet(noisy, times, embeddings).sample
        total: Tensor = (prediction.float() - v).square().mean()
        return total


def _train(
    work: Path, data: DenoiserData, plan: StagePlan, rank: int = 0, processes: int = 1, compiled: bool = False
) -> UNet2DConditionModel:
    torch.manual_seed(4)
    unet = new_unet()
    unet.set_attn_processor(AttnProcessor())  # on CPUs, the fused kernel's backward pass takes three times as long
    predict: UNet2DConditionModel = torch.compile(unet) if compiled else unet  # both have the same weights
    fit("unet", unet, lambda step: data.loss(predict, plan.batch // processes, (step, rank)), plan, work)
    return unet


def _share_training(
    rank: int, processes: int, address: str, work: Path, data: DenoiserData, plan: StagePlan, compiled: bool
) -> None:
    """Train in one of several processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=processes)
    _train(work, data, plan, rank, processes, compiled)
    torch.distributed.destroy_process_group()
