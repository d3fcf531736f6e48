"""Check of a base's prediction type against its denoiser's output, since its files may lack it or be wrong."""

import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.prediction import PREDICTION_KEY
from diffgraft.diffusion.parameterizations import Epsilon, V
from diffgraft.rng import normal
from diffgraft.trainers.training_data.examples import Examples

_MAX_IMAGES = 4
_ALPHA_BAR = 0.05
"""ᾱ of the checked timestep: with so little signal, ε is nearly the input, and v nearly the negative image"""
_MIN_EPSILON_COSINE, _MAX_V_MODEL_COSINE = 0.8, 0.5
"""Cosine to ε that an ε-predicting denoiser exceeds (it has 0.95 or more), and that a v-predicting one stays below"""
_MIN_V_COSINE = 0.3
"""Cosine to v that no denoiser reaches by chance"""


def prediction_warning(base: Base, examples: Examples) -> str:
    """Warning if the base's denoiser seems to predict something else than the base declares; empty otherwise.

    The check is one pass of the denoiser over a few images with much noise, and is deterministic.
    """
    if not isinstance(base.parameterization, Epsilon | V):
        return ""
    encoded = examples.encoded
    rows = [example.rows[0] for example in examples.examples]
    rows = [row for row in rows if encoded.frames[row].size == encoded.frames[rows[0]].size][:_MAX_IMAGES]
    latents = torch.stack([encoded.latents[row][0] for row in rows])
    epsilon, v = prediction_cosines(base, latents)
    declared = base.parameterization.name
    detected = declared
    if declared == Epsilon.name and epsilon < _MAX_V_MODEL_COSINE and v > max(_MIN_V_COSINE, epsilon):
        detected = V.name
    elif declared == V.name and epsilon > _MIN_EPSILON_COSINE:
        detected = Epsilon.name
    if detected == declared:
        return ""
    return (
        f"This base is used with prediction type {declared}, but seems to predict {detected}: with much noise the "
        f"cosine of its prediction is {epsilon:.2f} to ε and {v:.2f} to v. If its images come out grey or burnt, set "
        f"{PREDICTION_KEY}={detected}."
    )


@torch.no_grad()
def prediction_cosines(base: Base, latents: Tensor) -> tuple[float, float]:
    """Cosine similarities of the denoiser's prediction for noisy `latents` [n, c, h, w] to ε and to v."""
    parameterization = base.parameterization
    timestep = parameterization.nearest_timestep(_ALPHA_BAR)
    noise = normal(latents.shape, 0, 1)
    times = torch.full((len(latents),), timestep)
    noisy = parameterization.noised(latents, noise, times)
    alpha_bar = float(parameterization.signal(times)[0])
    v = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latents
    size = (latents.shape[-2] * base.vae_scale_factor, latents.shape[-1] * base.vae_scale_factor)
    conditioning = base.condition([""] * len(latents), size)
    prediction = base.denoise(noisy.to(base.device), times.to(base.device), conditioning).float().cpu().flatten()
    to_epsilon, to_v = (
        float(torch.nn.functional.cosine_similarity(prediction, target.flatten(), 0)) for target in (noise, v)
    )
    return to_epsilon, to_v
