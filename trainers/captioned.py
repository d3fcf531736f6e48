"""The captioned objective: denoise pictures under their own prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffgraft.bases import Framing
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.rng import normal
from diffgraft.trainers.examples import Examples, Shown


class Predict(Protocol):
    """What the UNet is asked through."""

    def __call__(self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[Framing], /) -> Tensor:
        """Noisy latents, timesteps, prompts, how the pictures were cut → the UNet's prediction."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents [n, c, h, w], what should be said of them, their timesteps [n], prompts and cuts."""

    noisy: Tensor
    target: Tensor
    times: Tensor
    prompts: list[str]
    frames: list[Framing]
    mask: Tensor | None
    """Factor on the error at each place of each sample, [n, 1, h, w]; None: all count alike"""
    weight: Tensor
    """Factor on the loss of each, [n]"""
    shown: list[Shown]

    def loss(self, process: ForwardProcess, said: Tensor) -> Tensor:
        """Mean over the batch of what `said` [n, c, h, w] is off."""
        return (process.loss_per_sample(said, self.target, self.times, self.mask) * self.weight).mean()


def draw_batch(
    examples: Examples, process: ForwardProcess, seed: int, place: int, count: int, kind: int, device: torch.device
) -> Batch:
    """Examples at `place` … of the shuffled line, with noise and timesteps of their own; `kind` keeps streams apart.

    Each example's noise is a function of its place alone, so how the line is cut into batches changes nothing.
    """
    shown = examples.at(seed + kind, place, count)
    rows = [one.row for one in shown]
    shape, places = examples.encoded.latents.shape(rows[0]), range(place, place + count)
    spread = torch.stack([normal(shape, seed, at, kind, 1) for at in places]).to(device)
    latents = examples.encoded.latents.sample(rows, spread)
    noisy, target, times = process.at_places(latents, [(seed, at, kind) for at in places])
    prompts = [examples.prompt(one, seed, at, kind) for one, at in zip(shown, places, strict=True)]
    mask, weight = examples.weight_map(shown), torch.tensor([one.example.weight for one in shown])
    mask = None if mask is None else mask.to(device)
    return Batch(noisy, target, times, prompts, examples.framing(shown), mask, weight.to(device), shown)


@dataclass(frozen=True)
class Captioned:
    """E‖ε − ε_θ(x_t, t, prompt)‖² over the examples (or the same in v)."""

    examples: Examples
    process: ForwardProcess
    seed: int
    device: torch.device

    def shown(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures at `place`."""
        return [one.example.name for one in self.examples.at(self.seed, place, count)]

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """The loss of the `count` examples at `place`, under the key "loss"; further keys are for the record."""
        batch = draw_batch(self.examples, self.process, self.seed, place, count, 0, self.device)
        return {"loss": batch.loss(self.process, predict(batch.noisy, batch.times, batch.prompts, batch.frames))}
