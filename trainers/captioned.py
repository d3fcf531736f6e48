"""The captioned objective: denoise pictures under their own prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.trainers.denoising import Noising
from diffgraft.trainers.examples import Examples, normal

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
    spread = torch.stack([normal(shape, seed, at, kind, 1) for at in places]).to(device)
    noisy, target, times = noising.at_places(examples.latents.sample(rows, spread), seed, places, kind)
    return Batch(noisy, target, times, [examples.prompts[row] for row in rows])


@dataclass(frozen=True)
class Captioned:
    """E‖ε − ε_θ(x_t, t, prompt)‖² over the examples (or the same in v)."""

    examples: Examples
    noising: Noising
    seed: int

    def shown(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures at `place`."""
        return [self.examples.names[row] for row in self.examples.rows(self.seed, place, count)]

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """The loss of the `count` examples at `place`, under the key "loss"; further keys are for the record."""
        batch = draw_batch(self.examples, self.noising, self.seed, place, count, 0)
        said = predict(batch.noisy, batch.times, batch.prompts)
        return {"loss": self.noising.errors(said, batch.target, batch.times).mean()}
