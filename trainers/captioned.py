"""The captioned objective: denoise pictures under their own prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.trainers.denoising import Noising, per_sample_loss
from diffgraft.trainers.examples import Examples, generator, normal

Predict = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""Noisy latents, timesteps, prompts → the UNet's prediction."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents [n, c, h, w], what should be said of them, their timesteps [n] and prompts."""

    noisy: Tensor
    target: Tensor
    times: Tensor
    prompts: list[str]


def draw_batch(examples: Examples, noising: Noising, seed: int, place: int, count: int, kind: int) -> Batch:
    """Examples at `place` … of the shuffled line, with noise and timesteps of their own; `kind` keeps streams apart."""
    rows = examples.rows(seed + kind, place, count)
    shape = (count, *examples.latents.mean.shape[1:])
    device = examples.latents.mean.device
    spread, noise = (normal(shape, seed, place, kind, n).to(device) for n in (1, 2))
    times = torch.randint(noising.steps, (count,), generator=generator(seed, place, kind, 3)).to(device)
    latents = examples.latents.sample(rows, spread)
    noisy, target = noising(latents, noise, times)
    return Batch(noisy, target, times, [examples.prompts[row] for row in rows])


@dataclass(frozen=True)
class Captioned:
    """E‖ε − ε_θ(x_t, t, prompt)‖² over the examples (or the same in v)."""

    examples: Examples
    noising: Noising
    seed: int

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """The loss of the `count` examples at `place`, under the key "loss"; further keys are for the record."""
        batch = draw_batch(self.examples, self.noising, self.seed, place, count, 0)
        return {"loss": per_sample_loss(predict(batch.noisy, batch.times, batch.prompts), batch.target).mean()}
