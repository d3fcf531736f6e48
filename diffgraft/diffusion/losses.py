"""The loss of a prediction: its distance from the target, and the weight of each timestep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.diffusion.parameterizations import Flow, Parameterization
from diffgraft.diffusion.settings import Loss
from diffgraft.errors import DiffgraftError


@dataclass(frozen=True)
class SampleLoss:
    """Loss of each sample, as set in a recipe, for a denoiser of a given parameterization."""

    parameterization: Parameterization
    settings: Loss

    def __call__(self, prediction: Tensor, target: Tensor, timesteps: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the loss [n] of each sample of a batch.

        Args:
            prediction: output of the denoiser, [n, c, h, w].
            target: target of the prediction, [n, c, h, w].
            timesteps: timestep of each sample, [n].
            weight: factor on the error at each position of each sample, [n, 1, h, w]; None: 1 everywhere.
        """
        error = elementwise_loss(prediction, target, timesteps, self.parameterization, self.settings)
        if weight is not None:
            error = error * weight
        return error.flatten(1).mean(1) * timestep_weights(timesteps, self.parameterization, self.settings)


def check_loss(settings: Loss, parameterization: Parameterization) -> None:
    """Raise DiffgraftError if a setting of the loss is undefined for the parameterization."""
    timesteps = torch.zeros(1, dtype=torch.long)
    elementwise_loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), timesteps, parameterization, settings)
    timestep_weights(timesteps, parameterization, settings)


def elementwise_loss(
    prediction: Tensor, target: Tensor, timesteps: Tensor, parameterization: Parameterization, settings: Loss
) -> Tensor:
    """Return the elementwise error between `prediction` and `target`, both [n, c, h, w], at `timesteps` [n].

    ``huber`` is the pseudo-Huber loss 2δ(√(d² + δ²) − δ): squared near zero, and proportional to the distance far from
    it, so that damaged pictures count less. Its δ may decrease towards pure noise (Khrapov et al. 2024,
    arXiv:2403.16728).
    """
    diff = prediction - target
    if settings.kind == "squared":
        return diff.square()
    delta = _huber_delta(timesteps, parameterization, settings).view(-1, *[1] * (diff.ndim - 1))
    return 2 * delta * ((diff.square() + delta.square()).sqrt() - delta)


def _huber_delta(timesteps: Tensor, parameterization: Parameterization, settings: Loss) -> Tensor:
    """Return δ of the pseudo-Huber loss for each of the `timesteps`; both have shape [n]."""
    share = timesteps.float() / parameterization.num_timesteps
    if settings.schedule == "exponential":
        return settings.delta**share
    if settings.schedule == "snr":
        if isinstance(parameterization, Flow):
            raise DiffgraftError("loss.schedule=snr is undefined for flow matching: use constant or exponential.")
        signal = parameterization.signal(timesteps).float()
        spread = ((1 - signal) / signal.clamp_min(1e-8)).sqrt()
        return (1 - settings.delta) / (1 + spread) ** 2 + settings.delta
    return torch.full_like(share, settings.delta)


def timestep_weights(timesteps: Tensor, parameterization: Parameterization, settings: Loss) -> Tensor:
    """Return the loss weight of each sample at `timesteps` [n], [n]: min-SNR, debiased estimation, or 1.

    Raises:
        DiffgraftError: the weight is undefined for the parameterization.
    """
    factor = torch.ones(len(timesteps), device=timesteps.device)
    if settings.snr_gamma is not None:
        factor = factor * parameterization.min_snr_weight(timesteps, settings.snr_gamma)
    if settings.debiased:
        factor = factor * parameterization.debiased_weight(timesteps)
    return factor
