"""Prior preservation without class images: under the class prompt the adapted base says what the bare one says.

In place of DreamBooth's own pictures of the class (Ruiz et al. 2022, arXiv:2208.12242, equation 2) stands what the
frozen base predicts for the instance pictures themselves, noise and timestep being the same: the distillation of
learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.captioned import Predict, draw_batch
from diffgraft.trainers.examples import Examples


@dataclass(frozen=True)
class Preserving:
    """L_instance + λ · E‖ε_θ(x_t, t, class) − ε_base(x_t, t, class)‖², over the same pictures."""

    examples: Examples
    bare: Predict
    """What the base says without the adapter"""
    prior_weight: float
    """λ"""
    process: ForwardProcess
    seed: int
    device: torch.device

    def shown(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures at `place`."""
        return [one.example.name for one in self.examples.at(self.seed, place, count)]

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Under "loss" the whole; the two terms stand beside it."""
        batch = draw_batch(self.examples, self.process, self.seed, place, count, 0, self.device)
        of_class = [
            self.examples.class_prompt(one, self.seed, at, 0)
            for one, at in zip(batch.shown, range(place, place + count), strict=True)
        ]
        with torch.no_grad():
            kept = self.bare(batch.noisy, batch.times, of_class, batch.frames)
        noisy, times = torch.cat([batch.noisy] * 2), torch.cat([batch.times] * 2)
        both = predict(noisy, times, batch.prompts + of_class, batch.frames * 2)
        instance = batch.loss(self.process, both[:count])
        prior = self.process.loss_per_sample(both[count:], kept, batch.times).mean()
        return {"loss": instance + self.prior_weight * prior, "instance": instance, "prior": prior}
