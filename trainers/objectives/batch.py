"""Batches of noisy latents, with what a denoiser should predict of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffgraft.bases import SizeConditioning
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.rng import normal
from diffgraft.trainers.training_data.examples import Examples, ExampleVariant

_LATENT = 1
"""Stream of random numbers that samples the VAE's distribution; 2 and up are those of `diffgraft.diffusion.noise`"""


class Predict(Protocol):
    """The denoiser, adapter and text encoders included, as objectives call it."""

    def __call__(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning], /
    ) -> Tensor:
        """Noisy latents [n, c, h, w], timesteps [n], n prompts and n framings → the prediction [n, c, h, w]."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents of n samples, and what should be predicted of them."""

    noisy: Tensor
    """[n, c, h, w]"""
    target: Tensor
    """[n, c, h, w]"""
    times: Tensor
    """Timesteps [n]"""
    prompts: list[str]
    frames: list[SizeConditioning]
    mask: Tensor | None
    """Factor on the error at each place of each sample, [n, 1, h, w]; None: all count alike"""
    weight: Tensor
    """Factor on the loss of each sample, [n]"""
    shown: list[ExampleVariant]

    def loss(self, process: ForwardProcess, prediction: Tensor) -> Tensor:
        """Mean over the batch of the weighted loss of a `prediction` [n, c, h, w]."""
        return (process.loss_per_sample(prediction, self.target, self.times, self.mask) * self.weight).mean()


@dataclass(frozen=True)
class SampleStream:
    """Samples in the order in which steps see them; which noise each has follows from its place alone."""

    examples: Examples
    process: ForwardProcess
    seed: int
    device: torch.device
    kind: int = 0
    """Keeps the random numbers of several lines of one run apart"""

    def batch(self, place: int, count: int) -> Batch:
        """The `count` samples from `place` on, with noise and timesteps of their own."""
        shown = self._at(place, count)
        rows = [one.row for one in shown]
        shape, places = self.examples.encoded.latents.shape(rows[0]), range(place, place + count)
        spread = torch.stack([normal(shape, self.seed, at, self.kind, _LATENT) for at in places]).to(self.device)
        latents = self.examples.encoded.latents.sample(rows, spread)
        noisy, target, times = self.process.at_places(latents, [(self.seed, at, self.kind) for at in places])
        prompts = [self.examples.prompt(one, self.seed, at, self.kind) for one, at in zip(shown, places, strict=True)]
        mask, weight = self.examples.weight_map(shown), torch.tensor([one.example.weight for one in shown])
        mask = None if mask is None else mask.to(self.device)
        framing = self.examples.size_conditioning(shown)
        return Batch(noisy, target, times, prompts, framing, mask, weight.to(self.device), shown)

    def names(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures from `place` on."""
        return [one.example.name for one in self._at(place, count)]

    def _at(self, place: int, count: int) -> list[ExampleVariant]:
        return self.examples.at(self.seed + self.kind, place, count)
