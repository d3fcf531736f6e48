"""Consistency distillation: an adapter with which the base draws in a few steps (LCM-LoRA, for any method).

Luo et al. 2023, arXiv:2310.04378, equations 8 to 14, and arXiv:2311.05556 for adapters. The consistency function

    f(x_t, t) = c_skip(t) · x_t + c_out(t) · x̂₀(x_t, t)

has the same value at all points of a path of the sampler. The adapter is held to that at both ends of a step of DDIM,
which the base alone takes under guidance; so the guidance is learned as well, and drawing needs none.
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind

_DATA, _TIME_SCALE, _HUBER = 0.5, 10.0, 1e-3
"""σ of the data and scale of timesteps in c_skip and c_out, and c of the pseudo-Huber loss, as in the authors' code"""


class ConsistencyOptions(Strict):
    """Options of the objective `consistency`: `loss.options.NAME=VALUE`."""

    guidance: float = Field(7.5, ge=1, le=100)
    """Scale of classifier-free guidance of the base's steps; `tiny` needs 3"""
    step: int = Field(20, ge=1, le=999)
    """Timesteps that a step of the base spans"""


class Boundary(NamedTuple):
    """Factors of the consistency function, [n, 1, 1, 1]; at timestep 0 it is its input."""

    skip: Tensor
    out: Tensor


def boundary(timesteps: Tensor) -> Boundary:
    """Return c_skip = σ² / (s² + σ²) and c_out = s / √(s² + σ²) of timesteps [n], with s = 10 · t."""
    scaled = _TIME_SCALE * timesteps.view(-1, 1, 1, 1).float()
    return Boundary(_DATA**2 / (scaled**2 + _DATA**2), scaled / (scaled**2 + _DATA**2) ** 0.5)


def ddim_step(parameterization: Parameterization, x: Tensor, x0: Tensor, timesteps: Tensor, to: Tensor) -> Tensor:
    """Return the latents [n, c, h, w] at timesteps `to` [n], one deterministic step of DDIM from `x` at `timesteps`.

    Song et al. 2020, arXiv:2010.02502, equation 12 with σ = 0; `x0` are the clean latents that are predicted for `x`.
    """
    zeros = torch.zeros_like(x)
    alpha, sigma = (
        parameterization.noised(*pair, timesteps) for pair in ((torch.ones_like(x), zeros), (zeros, torch.ones_like(x)))
    )
    noise = (x - alpha * x0) / sigma
    return parameterization.noised(x0, noise, to)


class Consistency:
    """E √((f_θ(x_t, t, prompt) − f_θ(x_s, s, prompt))² + c²) − c, where x_s is a guided step of the base from x_t.

    No gradient flows through the second term. It is computed by the adapter as it is, as in diffusers' script for LCM-
    LoRA, and not by a moving average of it.
    """

    def __init__(self, inputs: ObjectiveInputs) -> None:
        self.stream, self.bare, self.options = inputs.instances, inputs.bare, inputs.options

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` samples as "loss"."""
        batch = self.stream.batch(sample_index, count)
        parameterization = self.stream.process.parameterization
        noisy, times, prompts, frames = batch.noisy, batch.times, batch.prompts, batch.frames
        with torch.no_grad():
            both = self.bare(noisy.repeat(2, 1, 1, 1), times.repeat(2), [*prompts, *[""] * count], [*frames, *frames])
            own, empty = (parameterization.x0(noisy, half, times) for half in both.chunk(2))
            earlier = (times - self.options.step).clamp(min=0)
            x0 = empty + self.options.guidance * (own - empty)
            stepped = ddim_step(parameterization, noisy, x0, times, earlier)
            theirs = self._consistent(stepped, predict(stepped, earlier, prompts, frames), earlier)
        ours = self._consistent(noisy, predict(noisy, times, prompts, frames), times)
        error = ((ours - theirs).square() + _HUBER**2).sqrt() - _HUBER
        if batch.mask is not None:
            error = error * batch.mask
        return {"loss": (error.flatten(1).mean(1) * batch.weight).mean()}

    def _consistent(self, x: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """Return f(x, t) [n, c, h, w] for a prediction of the denoiser."""
        skip, out = boundary(timesteps)
        return skip * x + out * self.stream.process.parameterization.x0(x, prediction, timesteps)

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.stream.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind(
    "consistency",
    "Drawing in a few steps, without guidance.",
    Consistency,
    options=ConsistencyOptions,
    prompts=lambda *_: ("",),
    bare_predictions=3,
    has_own_error=True,
    uses_prior=False,
)
