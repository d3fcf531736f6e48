"""Batches of noisy latents with their targets, and the stream of samples that they are drawn from."""

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
"""Random stream that samples the distribution of the VAE; `diffgraft.diffusion.noise` has streams 2 and up"""


class Predict(Protocol):
    """The denoiser with text encoders and adapter, as objectives call it."""

    def __call__(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning], /
    ) -> Tensor:
        """Predict from noisy latents [n, c, h, w], timesteps [n], n prompts and n frames: [n, c, h, w]."""


@dataclass(frozen=True)
class Batch:
    """Noisy latents of n samples, their targets and prompts."""

    noisy: Tensor
    """[n, c, h, w]"""
    target: Tensor
    """[n, c, h, w]"""
    times: Tensor
    """Timesteps [n]"""
    prompts: list[str]
    frames: list[SizeConditioning]
    mask: Tensor | None
    """Factor on the error at each position of each sample, [n, 1, h, w]; None: all count alike"""
    weight: Tensor
    """Factor on the loss of each sample, [n]"""
    variants: list[ExampleVariant]
    """Pictures of the samples, as cropped and mirrored"""

    def loss(self, process: ForwardProcess, prediction: Tensor) -> Tensor:
        """Return the weighted mean loss of a `prediction` [n, c, h, w] over the batch, a scalar."""
        return (process.loss_per_sample(prediction, self.target, self.times, self.mask) * self.weight).mean()


@dataclass(frozen=True)
class SampleStream:
    """Samples in the order of training; the sample index alone determines picture, noise and timestep."""

    examples: Examples
    process: ForwardProcess
    seed: int
    device: torch.device
    kind: int = 0
    """Number that separates the random streams of instance pictures (0) and class images (1)"""

    def batch(self, sample_index: int, count: int) -> Batch:
        """Return the batch of `count` samples that starts at `sample_index`."""
        variants = self._at(sample_index, count)
        rows = [variant.row for variant in variants]
        shape, indices = self.examples.encoded.latents.shape(rows[0]), range(sample_index, sample_index + count)
        spread = torch.stack([normal(shape, self.seed, index, self.kind, _LATENT) for index in indices]).to(self.device)
        latents = self.examples.encoded.latents.sample(rows, spread)
        noisy, target, times = self.process.at_places(latents, [(self.seed, index, self.kind) for index in indices])
        prompts = [
            self.examples.prompt(variant, self.seed, index, self.kind)
            for variant, index in zip(variants, indices, strict=True)
        ]
        mask, weight = (
            self.examples.weight_map(variants),
            torch.tensor([variant.example.weight for variant in variants]),
        )
        mask = None if mask is None else mask.to(self.device)
        frames = self.examples.size_conditioning(variants)
        return Batch(noisy, target, times, prompts, frames, mask, weight.to(self.device), variants)

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples, starting at `sample_index`."""
        return [variant.example.name for variant in self._at(sample_index, count)]

    def _at(self, sample_index: int, count: int) -> list[ExampleVariant]:
        return self.examples.at(self.seed + self.kind, sample_index, count)
