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
    """Examples at `place` … of the shuffled line, with noise and timesteps of their own; `kind` keeps streams apart.

    Each example's noise is a function of its place alone, so how the line is cut into batches changes nothing.
    """
    rows = examples.rows(seed + kind, place, count)
    shape, device = examples.latents.mean.shape[1:], examples.latents.mean.device
    places = range(place, place + count)
    spread, noise = (torch.stack([normal(shape, seed, at, kind, n) for at in places]).to(device) for n in (1, 2))
    drawn = [torch.randint(noising.steps, (1,), generator=generator(seed, at, kind, 3)) for at in places]
    times = torch.cat(drawn).to(device)
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
