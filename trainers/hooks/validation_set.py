"""What was learnt, in numbers: the loss on pictures that training never saw, and how far a class has moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases import Base
from diffgraft.data.latents import encode
from diffgraft.data.pictures import square, to_tensor
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.progress import track
from diffgraft.rng import generator, normal
from diffgraft.trainers.denoiser import Denoiser, forward_process


@dataclass(frozen=True)
class Probe:
    """Fixed noisy latents of pictures left out of training: timesteps and noises the same for every adapter."""

    noisy: Tensor
    """[pairs, c, h, w]"""
    target: Tensor
    """[pairs, c, h, w]"""
    times: Tensor
    """[pairs], spread evenly over the schedule"""
    weight: Tensor
    """[pairs, 1, h, w], summing to 1 over each picture: where the subject is"""
    pictures: Sequence[int]
    """[pairs], which picture each is of"""

    @torch.no_grad()
    def predict(self, base: Base, prompt: str | Sequence[str], batch: int = 32) -> Tensor:
        """What the base says of all pairs under `prompt`, one for all pictures or one for each: [pairs, c, h, w]."""
        prompts = [prompt if isinstance(prompt, str) else prompt[picture] for picture in self.pictures]
        denoiser, out = Denoiser(base), []
        for start in track(range(0, len(self.times), batch), "held-out loss"):
            rows = slice(start, start + batch)
            noisy = self.noisy[rows].to(base.device)
            out.append(denoiser(noisy, self.times[rows].to(base.device), prompts[rows]).cpu())
        return torch.cat(out)

    def loss(self, base: Base, prompt: str | Sequence[str]) -> float:
        """Mean squared error under `prompt`, over all pairs and, where there is a mask, over the subject alone."""
        error = (self.predict(base, prompt) - self.target).square().mean(1, keepdim=True)
        return float((error * self.weight).flatten(1).sum(1).mean())

    def change(self, prediction: Tensor, base: Base, prompt: str | Sequence[str]) -> float:
        """Mean squared difference between what the base says now under `prompt` and an earlier `prediction`."""
        return float((self.predict(base, prompt) - prediction).square().mean())


def make_probe(
    base: Base,
    images: Sequence[Image.Image],
    masks: Sequence[Image.Image] | None = None,
    pairs: int = 256,
    seed: int = 2026,
    side: int | None = None,
) -> Probe:
    """A probe on `images`; `masks` ("L", white where the subject is) have the images' sizes."""
    side = side or base.resolution
    found = encode(base, images, side, "encoding held-out pictures")
    latents = torch.stack([found[row][0] for row in range(len(found))])
    weight = torch.ones(len(images), *latents.shape[-2:])
    if masks is not None:
        shown = to_tensor([square(mask.convert("RGB"), side) for mask in masks])[:, :1] / 2 + 0.5
        weight = F.adaptive_avg_pool2d(shown, (latents.shape[-2], latents.shape[-1]))[:, 0]
    return probe_of(forward_process(base), latents, weight, pairs, seed)


def probe_of(process: ForwardProcess, latents: Tensor, weight: Tensor, pairs: int, seed: int) -> Probe:
    """A probe on `latents` [n, c, h, w], each counting where its `weight` [n, h, w] says."""
    rows = torch.arange(pairs) % len(latents)
    jitter = torch.rand(pairs, generator=generator(seed, 0))
    order = torch.randperm(pairs, generator=generator(seed, 1))  # no picture is tied to one part of the schedule
    times = ((order + jitter) / pairs * process.parameterization.num_timesteps).long()
    noisy, target, _ = process.at_timesteps(latents[rows], normal(latents[rows].shape, seed, 2), times)
    weight = (weight / weight.flatten(1).sum(1).view(-1, 1, 1)).unsqueeze(1)
    return Probe(noisy, target, times, weight[rows], rows.tolist())
