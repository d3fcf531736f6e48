"""The noise that training lays on latents, and the timesteps at which it does: plain, or in one of the field's ways.

Everything random is a function of seed and place, so how the line of examples is cut into batches changes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.examples import generator, normal
from diffgraft.trainers.settings import Noise, Timesteps

_NOISE, _TIMES, _OFFSET, _PYRAMID, _PERTURBATION = 2, 3, 5, 6, 7
"""Streams of random numbers at one place; 1 is what samples the VAE's distribution"""


def draw_noise(shape: Sequence[int], settings: Noise, seed: int, place: int, kind: int) -> Tensor:
    """Noise [c, h, w] for the example at `place`: what the UNet is to find again.

    Offset noise adds one number to each channel, so that the brightness of a whole picture can be learnt (Guttenberg
    2023, www.crosslabs.org/blog/diffusion-with-offset-noise). Pyramid noise adds coarser and coarser noise, each level
    weaker by a factor, and scales the sum to unit variance (Whitaker 2023, "Multi-resolution noise for diffusion model
    training").
    """
    noise = normal(shape, seed, place, kind, _NOISE)
    if settings.offset:
        noise = noise + settings.offset * normal((shape[0], 1, 1), seed, place, kind, _OFFSET)
    if settings.pyramid:
        noise = _pyramid(noise, settings.pyramid, seed, place, kind)
    return noise


def _pyramid(noise: Tensor, discount: float, seed: int, place: int, kind: int) -> Tensor:
    channels, height, width = noise.shape
    steps = torch.rand(10, generator=generator(seed, place, kind, _PYRAMID)) * 2 + 2
    for level, step in enumerate(steps.tolist()):
        height, width = max(1, int(height / step**level)), max(1, int(width / step**level))
        coarse = normal((1, channels, height, width), seed, place, kind, _PYRAMID, level)
        noise = noise + discount**level * F.interpolate(coarse, noise.shape[1:], mode="bilinear")[0]
        if height == 1 or width == 1:
            break
    return noise / noise.std()


def perturbed(noise: Tensor, settings: Noise, seed: int, place: int, kind: int) -> Tensor:
    """The noise that is laid on the latents in the place of `noise`, which stays what is to be found.

    Input perturbation (Ning et al. 2023, arXiv:2301.11706): ε + γ · ξ, against exposure bias.
    """
    return noise + settings.perturbation * normal(noise.shape, seed, place, kind, _PERTURBATION)


def check_range(settings: Timesteps, steps: int) -> None:
    """Raises DiffgraftError where a schedule of so many steps has no such timesteps."""
    last = steps - 1 if settings.last is None else settings.last
    if settings.first > last or last >= steps:
        raise DiffgraftError(
            f"timesteps.first={settings.first} and timesteps.last={last} will not do: this base's schedule goes from 0 "
            f"to {steps - 1}, and the first may not come after the last."
        )


def draw_time(steps: int, settings: Timesteps, seed: int, place: int, kind: int) -> int:
    """The timestep of the example at `place`, of a schedule of so many."""
    first = settings.first
    last = steps - 1 if settings.last is None else settings.last
    drawn = generator(seed, place, kind, _TIMES)
    if settings.spread == "uniform":
        return int(torch.randint(first, last + 1, (1,), generator=drawn))
    share = float(torch.sigmoid(settings.mean + settings.width * torch.randn(1, generator=drawn)))
    return min(last, first + int(share * (last + 1 - first)))
