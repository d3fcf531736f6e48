"""UniPC, which k-diffusion has not: the scheduler of diffusers, run on the noise levels of any schedule."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffgraft.bases.prediction import PREDICTION_KEY
from diffgraft.generation.samplers.k_diffusion import Denoise, Noise


def unipc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:  # noqa: ARG001
    """UniPC of order 3 with B₁(h), as in webui (Zhao et al. 2023, arXiv:2302.04867).

    The latents of diffusers are x / √(1 + σ²).
    """
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(solver_order=3, solver_type="bh1", **{PREDICTION_KEY: "sample"})
    count = len(sigmas) - 1
    scheduler.set_timesteps(count)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.arange(count)  # only their order counts, as the levels are given
    scheduler.set_begin_index(0)
    for step, (before, after) in enumerate(pairwise(sigmas)):
        clean = denoise(x, before)
        if after == 0:
            x = clean  # the limit of the method; the scheduler divides by σ
        else:
            own = x / (1 + before**2) ** 0.5
            x = scheduler.step(clean, scheduler.timesteps[step], own).prev_sample * (1 + after**2) ** 0.5
        yield x
