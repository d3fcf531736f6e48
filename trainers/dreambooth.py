"""The DreamBooth objective: a subject's pictures under its trigger, and the class kept as it was.

Ruiz et al. 2022 (arXiv:2208.12242), equation 2: L = L_instance + λ · L_prior, where the second term is over pictures
of the class that the frozen base drew itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.trainers.captioned import Predict, draw_batch
from diffgraft.trainers.denoising import Noising
from diffgraft.trainers.examples import Examples


@dataclass(frozen=True)
class DreamBooth:
    """Instance and class examples in one pass of the UNet."""

    instance: Examples
    prior: Examples
    prior_weight: float
    """λ"""
    noising: Noising
    seed: int

    def shown(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures at `place`, and of as many class images."""
        pairs = ((self.instance, self.seed), (self.prior, self.seed + 1))
        return [data.names[row] for data, seed in pairs for row in data.rows(seed, place, count)]

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Under "loss" L_instance + λ · L_prior; the two terms stand beside it."""
        ours = draw_batch(self.instance, self.noising, self.seed, place, count, 0)
        kept = draw_batch(self.prior, self.noising, self.seed, place, count, 1)
        noisy, target = torch.cat([ours.noisy, kept.noisy]), torch.cat([ours.target, kept.target])
        times = torch.cat([ours.times, kept.times])
        errors = self.noising.errors(predict(noisy, times, ours.prompts + kept.prompts), target, times)
        instance, prior = errors[:count].mean(), errors[count:].mean()
        return {"loss": instance + self.prior_weight * prior, "instance": instance, "prior": prior}
