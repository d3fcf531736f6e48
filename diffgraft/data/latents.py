"""Pictures as the VAE's latents, encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffgraft.bases import Base
from diffgraft.data.pictures import square, to_tensor
from diffgraft.quiet import hushed


@dataclass(frozen=True)
class Latents:
    """What the VAE says of n pictures: a normal distribution each, scaled as the UNet expects."""

    mean: Tensor
    """[n, c, h, w]"""
    std: Tensor
    """[n, c, h, w]"""

    def sample(self, rows: Sequence[int], noise: Tensor) -> Tensor:
        """Latents [len(rows), c, h, w] for standard normal `noise` of that shape."""
        index = torch.as_tensor(rows, device=self.mean.device)
        return self.mean[index] + self.std[index] * noise

    def take(self, rows: Sequence[int]) -> "Latents":
        """Those of the pictures in `rows`, which may come more than once."""
        index = torch.as_tensor(rows, device=self.mean.device)
        return Latents(self.mean[index], self.std[index])

    def __len__(self) -> int:
        return len(self.mean)


@torch.no_grad()
def encode(base: Base, images: Sequence[Image.Image], side: int, title: str = "encoding pictures") -> Latents:
    """Latents of `images`, each cut to a square of `side` pixels first."""
    means, stds = [], []
    stored = base.vae.dtype
    with hushed():
        base.vae.to(torch.float32)  # some overflow in float16; casting there and back changes no bit
    scale = base.vae.config.scaling_factor
    try:
        for image in tqdm(images, title, leave=False, disable=len(images) < 2):
            pixels = to_tensor([square(image, side)]).to(base.vae.device)
            distribution = base.vae.encode(pixels).latent_dist
            means.append(distribution.mean.float() * scale)
            stds.append(distribution.std.float() * scale)
    finally:
        with hushed():
            base.vae.to(stored)
    return Latents(torch.cat(means), torch.cat(stds))
