"""Fixed noisy latents of held-out images, which measure an adapter: its loss, and how far its predictions drift."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffgraft.bases import Base
from diffgraft.data.latents import encode
from diffgraft.data.pictures import crop_to_square
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.pixels import to_tensor
from diffgraft.progress import track
from diffgraft.rng import generator, normal
from diffgraft.trainers.denoiser import Denoiser, forward_process


@dataclass(frozen=True)
class ValidationSet:
    """Pairs of a held-out image and a timestep, with fixed noise: the same for every adapter."""

    noisy: Tensor
    """[pairs, c, h, w]"""
    target: Tensor
    """[pairs, c, h, w]"""
    timesteps: Tensor
    """[pairs], spread evenly over the schedule"""
    weight: Tensor
    """[pairs, 1, h, w], where the subject is; sums to 1 over each image"""
    images: Sequence[int]
    """[pairs], index of each pair's image"""

    @torch.no_grad()
    def predict(self, base: Base, prompt: str | Sequence[str], batch: int = 32) -> Tensor:
        """Predictions of the base for all pairs, [pairs, c, h, w].

        Args:
            base: the base, with or without an adapter attached.
            prompt: one prompt for all images, or a list with one for each image.
            batch: number of pairs in one pass of the denoiser.
        """
        prompts = [prompt if isinstance(prompt, str) else prompt[image] for image in self.images]
        denoiser, predictions = Denoiser(base), []
        for start in track(range(0, len(self.timesteps), batch), "held-out loss"):
            rows = slice(start, start + batch)
            noisy = self.noisy[rows].to(base.device)
            predictions.append(denoiser(noisy, self.timesteps[rows].to(base.device), prompts[rows]).cpu())
        return torch.cat(predictions)

    def loss(self, base: Base, prompt: str | Sequence[str]) -> float:
        """Mean squared error of the predictions under `prompt` over all pairs; with masks, over the subject alone."""
        error = (self.predict(base, prompt) - self.target).square().mean(1, keepdim=True)
        return float((error * self.weight).flatten(1).sum(1).mean())

    def prediction_drift(self, prediction: Tensor, base: Base, prompt: str | Sequence[str]) -> float:
        """Mean squared difference of the base's predictions under `prompt` from an earlier `prediction`."""
        return float((self.predict(base, prompt) - prediction).square().mean())


def validation_set_from_images(
    base: Base,
    images: Sequence[Image.Image],
    masks: Sequence[Image.Image] | None = None,
    pairs: int = 256,
    seed: int = 2026,
    side: int | None = None,
) -> ValidationSet:
    """Encode `images` and pair them with timesteps and noise.

    Args:
        base: the base whose VAE encodes them.
        images: RGB images.
        masks: for each image a mask of its size in mode L, white where the subject is.
        pairs: number of pairs, dealt out to the images in turn.
        seed: seed of timesteps and noise.
        side: side in pixels to which the images are cropped and scaled; by default the base's resolution.
    """
    side = side or base.resolution
    encoded = encode(base, images, side, "encoding held-out pictures")
    latents = torch.stack([encoded[row][0] for row in range(len(encoded))])
    weight = torch.ones(len(images), *latents.shape[-2:])
    if masks is not None:
        scaled = to_tensor([crop_to_square(mask.convert("RGB"), side) for mask in masks])[:, :1] / 2 + 0.5
        weight = F.adaptive_avg_pool2d(scaled, (latents.shape[-2], latents.shape[-1]))[:, 0]
    return validation_set_from_latents(forward_process(base), latents, weight, pairs, seed)


def validation_set_from_latents(
    process: ForwardProcess, latents: Tensor, weight: Tensor, pairs: int, seed: int
) -> ValidationSet:
    """Pair `latents` [n, c, h, w] with timesteps and noise; `weight` [n, h, w] weights their errors."""
    rows = torch.arange(pairs) % len(latents)
    jitter = torch.rand(pairs, generator=generator(seed, 0))
    order = torch.randperm(pairs, generator=generator(seed, 1))  # no image is tied to one part of the schedule
    timesteps = ((order + jitter) / pairs * process.parameterization.num_timesteps).long()
    noisy, target, _ = process.at_timesteps(latents[rows], normal(latents[rows].shape, seed, 2), timesteps)
    weight = (weight / weight.flatten(1).sum(1).view(-1, 1, 1)).unsqueeze(1)
    return ValidationSet(noisy, target, timesteps, weight[rows], rows.tolist())
