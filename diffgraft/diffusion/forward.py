"""The forward process of training: noise added to latents at random timesteps, and what should be predicted of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffgraft.diffusion.losses import SampleLoss, check_loss
from diffgraft.diffusion.noise import check_timesteps, draw_noise, draw_timestep, perturbed
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.diffusion.settings import Loss, Noise, Timesteps


class Noised(NamedTuple):
    """Noisy latents and what should be predicted of them."""

    noisy: Tensor
    """[n, c, h, w]"""
    target: Tensor
    """[n, c, h, w]"""
    timesteps: Tensor
    """[n]"""


class ForwardProcess:
    """Adds noise to latents as a recipe says; `loss_per_sample` is the loss that goes with it."""

    def __init__(
        self,
        parameterization: Parameterization,
        noise: Noise | None = None,
        timesteps: Timesteps | None = None,
        loss: Loss | None = None,
    ) -> None:
        """Take the settings; what is not given is plain.

        Raises:
            DiffgraftError: a setting is undefined for the parameterization, or its schedule has no such timesteps.
        """
        self.parameterization = parameterization
        self._noise = noise or Noise.model_validate({})
        self._timesteps = timesteps or Timesteps.model_validate({})
        loss = loss or Loss.model_validate({})
        check_timesteps(self._timesteps, parameterization.num_timesteps)
        check_loss(loss, parameterization)
        self.loss_per_sample = SampleLoss(parameterization, loss)

    def at_timesteps(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Given noise [n, c, h, w] added to `latents` [n, c, h, w] at given `timesteps` [n]."""
        noisy = self.parameterization.noised(latents, noise, timesteps)
        return Noised(noisy, self.parameterization.target(latents, noise, timesteps), timesteps)

    def at_places(self, latents: Tensor, places: Sequence[Sequence[int]]) -> Noised:
        """Random noise at random timesteps for `latents` [n, c, h, w]; `places` are those of `diffgraft.rng`, n."""
        shape, device = latents.shape[1:], latents.device
        noise = torch.stack([draw_noise(shape, self._noise, place) for place in places])
        count = self.parameterization.num_timesteps
        timesteps = torch.tensor([draw_timestep(count, self._timesteps, place) for place in places]).to(device)
        found = self.at_timesteps(latents, noise.to(device), timesteps)
        if not self._noise.perturbation:
            return found
        more = [perturbed(own, self._noise, place) for own, place in zip(noise, places, strict=True)]
        return found._replace(noisy=self.parameterization.noised(latents, torch.stack(more).to(device), timesteps))
