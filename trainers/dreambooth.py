"""The DreamBooth objective: a subject's pictures under its trigger, and the class kept as it was.

Ruiz et al. 2022 (arXiv:2208.12242), equation 2: L = L_instance + λ · L_prior, where the second term is over pictures
of the class that the frozen base drew itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.captioned import Predict, draw_batch
from diffgraft.trainers.examples import Examples


@dataclass(frozen=True)
class DreamBooth:
    """Instance and class examples, in one pass of the UNet where their pictures are of one size."""

    instance: Examples
    prior: Examples
    """Each has its λ for a weight"""
    process: ForwardProcess
    seed: int
    device: torch.device

    def shown(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures at `place`, and of as many class images."""
        pairs = ((self.instance, self.seed), (self.prior, self.seed + 1))
        return [one.example.name for data, seed in pairs for one in data.at(seed, place, count)]

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Under "loss" L_instance + λ · L_prior; the two terms stand beside it, the second without its λ."""
        ours = draw_batch(self.instance, self.process, self.seed, place, count, 0, self.device)
        kept = draw_batch(self.prior, self.process, self.seed, place, count, 1, self.device)
        if ours.noisy.shape == kept.noisy.shape:
            noisy, times = torch.cat([ours.noisy, kept.noisy]), torch.cat([ours.times, kept.times])
            both = predict(noisy, times, ours.prompts + kept.prompts, ours.frames + kept.frames)
            said_of_ours, said_of_kept = both[:count], both[count:]
        else:
            said_of_ours = predict(ours.noisy, ours.times, ours.prompts, ours.frames)
            said_of_kept = predict(kept.noisy, kept.times, kept.prompts, kept.frames)
        instance = ours.loss(self.process, said_of_ours)
        errors = self.process.loss_per_sample(said_of_kept, kept.target, kept.times)
        return {
            "loss": instance + (errors * kept.weight).mean(),
            "instance": instance,
            "prior": errors.mean(),
        }
