"""What a base's denoiser seems to predict, by a look at some pictures: its files may say nothing, or be wrong."""

import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.prediction import PREDICTION_KEY
from diffgraft.diffusion.parameterizations import Epsilon, V
from diffgraft.rng import normal
from diffgraft.trainers.training_data.examples import Examples

_PICTURES = 4
_KEPT = 0.05
"""ᾱ at which it is looked: little of a picture is left, so that ε is nearly the input, and v nearly the picture"""
_IS_NOISE, _IS_NOT_NOISE = 0.8, 0.5
"""Cosines to ε that a UNet which predicts it exceeds there (it has 0.95 and more), or that one for v stays under"""
_IS_V = 0.3
"""Cosine to v that no network has by chance"""


def odd_prediction(base: Base, examples: Examples) -> str:
    """What a person is told where a base seems to predict something else than it says; empty where it does not.

    One pass of the denoiser over a few pictures under much noise, the same ones each time.
    """
    if not isinstance(base.parameterization, Epsilon | V):
        return ""
    encoded = examples.encoded
    rows = [one.rows[0] for one in examples.examples]
    rows = [row for row in rows if encoded.frames[row].size == encoded.frames[rows[0]].size][:_PICTURES]
    latents = torch.stack([encoded.latents[row][0] for row in rows])
    epsilon, v = cosines(base, latents)
    says = base.parameterization.name
    fits = says
    if says == Epsilon.name and epsilon < _IS_NOT_NOISE and v > max(_IS_V, epsilon):
        fits = V.name
    elif says == V.name and epsilon > _IS_NOISE:
        fits = Epsilon.name
    if fits == says:
        return ""
    return (
        f"This base is trained as one that predicts {says}, and seems to predict {fits}: under much noise what it says "
        f"is near to ε by {epsilon:.2f}, and near to v by {v:.2f} (1 would be the same). If its pictures come out grey "
        f"or burnt, set {PREDICTION_KEY}={fits}."
    )


@torch.no_grad()
def cosines(base: Base, latents: Tensor) -> tuple[float, float]:
    """How near what the denoiser predicts of noisy `latents` [n, c, h, w] is to ε and to v, as cosines."""
    parameterization = base.parameterization
    time = parameterization.nearest_timestep(_KEPT)
    noise = normal(latents.shape, 0, 1)
    times = torch.full((len(latents),), time)
    noisy = parameterization.noised(latents, noise, times)
    kept = float(parameterization.signal(times)[0])
    v = kept**0.5 * noise - (1 - kept) ** 0.5 * latents
    size = (latents.shape[-2] * base.vae_scale_factor, latents.shape[-1] * base.vae_scale_factor)
    told = base.condition([""] * len(latents), size)
    said = base.denoise(noisy.to(base.device), times.to(base.device), told)
    flat = said.float().cpu().flatten()
    near = [float(torch.nn.functional.cosine_similarity(flat, one.flatten(), 0)) for one in (noise, v)]
    return near[0], near[1]
