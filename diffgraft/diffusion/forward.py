"""The forward process of training: noise added to latents at random timesteps, and the target of the prediction."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffgraft.diffusion.losses import SampleLoss, check_loss
from diffgraft.diffusion.noise import check_timesteps, draw_noise, draw_timestep, perturbed
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.diffusion.settings import Loss, Noise, Timesteps
from diffgraft.errors import DiffgraftError


class Noised(NamedTuple):
    """Noisy latents with their targets and timesteps."""

    noisy: Tensor
    """Noisy latents, [n, c, h, w]"""
    target: Tensor
    """Target of the prediction, [n, c, h, w]"""
    timesteps: Tensor
    """Timestep of each sample, [n]"""


class ForwardProcess:
    """Adds noise to latents as set in a recipe; `loss_per_sample` is the matching loss."""

    def __init__(
        self,
        parameterization: Parameterization,
        noise: Noise | None = None,
        timesteps: Timesteps | None = None,
        loss: Loss | None = None,
        size_shift: Callable[[int, int], float] | None = None,
    ) -> None:
        """Create the process from settings; None stands for the defaults.

        Args:
            parameterization: prediction and noise schedule of the denoiser.
            noise: kinds of noise.
            timesteps: distribution of the timesteps.
            loss: loss function and weights.
            size_shift: function from height and width of latents to the shift of timesteps that ``shift=size`` means.

        Raises:
            DiffgraftError: a setting is undefined for the parameterization, or its schedule has no such timesteps.
        """
        self.parameterization = parameterization
        self._noise = noise or Noise.model_validate({})
        self._timesteps = timesteps or Timesteps.model_validate({})
        loss = loss or Loss.model_validate({})
        check_timesteps(self._timesteps, parameterization.num_timesteps)
        check_loss(loss, parameterization)
        self._size_shift = size_shift
        if self._timesteps.shift == "size" and size_shift is None:
            raise DiffgraftError(
                "timesteps.shift=size has no meaning for this base: only families of flow matching have a shift by "
                "size. Set a number."
            )
        self.loss_per_sample = SampleLoss(parameterization, loss)

    def _shift(self, height: int, width: int) -> float:
        """Return the shift of timesteps for latents of this size."""
        shift = self._timesteps.shift
        if isinstance(shift, float):
            return shift
        assert self._size_shift is not None
        return self._size_shift(height, width)

    def at_timesteps(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Add the given noise [n, c, h, w] to `latents` [n, c, h, w] at the given `timesteps` [n]."""
        noisy = self.parameterization.noised(latents, noise, timesteps)
        return Noised(noisy, self.parameterization.target(latents, noise, timesteps), timesteps)

    def at_places(self, latents: Tensor, places: Sequence[Sequence[int]]) -> Noised:
        """Add random noise at random timesteps to `latents` [n, c, h, w].

        Args:
            latents: clean latents.
            places: seed and key of the random numbers of each of the n samples, as for `diffgraft.rng`.
        """
        shape, device = latents.shape[1:], latents.device
        noise = torch.stack([draw_noise(shape, self._noise, place) for place in places])
        count = self.parameterization.num_timesteps
        shift = self._shift(*shape[-2:])
        drawn = [draw_timestep(count, self._timesteps, place, shift) for place in places]
        timesteps = torch.tensor(drawn).to(device)
        noised = self.at_timesteps(latents, noise.to(device), timesteps)
        if not self._noise.perturbation:
            return noised
        inputs = [perturbed(sample, self._noise, place) for sample, place in zip(noise, places, strict=True)]
        return noised._replace(noisy=self.parameterization.noised(latents, torch.stack(inputs).to(device), timesteps))
