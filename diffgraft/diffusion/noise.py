"""Noise and timesteps that training adds to latents: plain, or in one of the field's variants.

A `rng_key` is the tuple (seed, *key) of a sample for `diffgraft.rng`, so that each sample has the same noise in every
run, whatever the batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.diffusion.settings import Noise, Timesteps
from diffgraft.errors import DiffgraftError
from diffgraft.rng import generator, normal

_NOISE, _TIMES, _OFFSET, _PYRAMID, _PERTURBATION = 2, 3, 5, 6, 7
"""Streams of random numbers of a sample; 1 is the one for sampling the VAE's distribution"""


def draw_noise(shape: Sequence[int], settings: Noise, rng_key: Sequence[int]) -> Tensor:
    """Draw the noise [c, h, w] of the sample with this `rng_key` (seed and index, see `diffgraft.rng`).

    Offset noise adds one number to each channel, so that the brightness of a whole picture can be learnt (Guttenberg
    2023, www.crosslabs.org/blog/diffusion-with-offset-noise). Pyramid noise adds coarser and coarser noise, each level
    weaker by a factor, and scales the sum to unit variance (Whitaker 2023, "Multi-resolution noise for diffusion model
    training").
    """
    noise = normal(shape, *rng_key, _NOISE)
    if settings.offset:
        noise = noise + settings.offset * normal((shape[0], 1, 1), *rng_key, _OFFSET)
    if settings.pyramid:
        noise = _pyramid(noise, settings.pyramid, rng_key)
    return noise


def _pyramid(noise: Tensor, discount: float, rng_key: Sequence[int]) -> Tensor:
    channels, height, width = noise.shape
    steps = torch.rand(10, generator=generator(*rng_key, _PYRAMID)) * 2 + 2
    for level, step in enumerate(steps.tolist()):
        height, width = max(1, int(height / step**level)), max(1, int(width / step**level))
        coarse = normal((1, channels, height, width), *rng_key, _PYRAMID, level)
        noise = noise + discount**level * F.interpolate(coarse, noise.shape[1:], mode="bilinear")[0]
        if height == 1 or width == 1:
            break
    return noise / noise.std()


def perturbed(noise: Tensor, settings: Noise, rng_key: Sequence[int]) -> Tensor:
    """Return the noise [c, h, w] to add to latents when the target is still computed from `noise`.

    Input perturbation (Ning et al. 2023, arXiv:2301.11706, equation 6): ε + γ · ξ, against exposure bias.
    """
    return noise + settings.perturbation * normal(noise.shape, *rng_key, _PERTURBATION)


def check_timesteps(settings: Timesteps, num_timesteps: int) -> None:
    """Raise DiffgraftError if a schedule of `num_timesteps` does not have the timesteps of `settings`."""
    last = num_timesteps - 1 if settings.max is None else settings.max
    if settings.min > last or last >= num_timesteps:
        raise DiffgraftError(
            f"Invalid timesteps.min={settings.min} and timesteps.max={last}: both must be between 0 and "
            f"{num_timesteps - 1}, the schedule of this base, and min must not be above max."
        )


def draw_timestep(num_timesteps: int, settings: Timesteps, rng_key: Sequence[int], shift: float = 1.0) -> int:
    """Draw the timestep of the sample with this `rng_key` (seed and index), on a schedule of `num_timesteps`.

    ``logit-normal`` is the sigmoid of a normal number, scaled to the schedule (Esser et al. 2024, arXiv:2403.03206,
    section 3.1). The share of the schedule is then moved by `shift` (equation 23).
    """
    first = settings.min
    last = num_timesteps - 1 if settings.max is None else settings.max
    drawn = generator(*rng_key, _TIMES)
    if settings.distribution == "logit-normal":
        share = float(torch.sigmoid(settings.mean + settings.std * torch.randn(1, generator=drawn)))
    elif shift == 1:
        return int(torch.randint(first, last + 1, (1,), generator=drawn))
    else:
        share = float(torch.rand(1, generator=drawn))
    share = shift * share / (1 + (shift - 1) * share)
    return min(last, first + int(share * (last + 1 - first)))
