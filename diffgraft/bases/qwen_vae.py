"""The autoencoder of Qwen-Image, which other families use as well; to it a picture is a video of a single frame."""

import torch
from torch import Tensor

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, LatentSpec
from diffgraft.bases.flow import FlowFamily

QWEN_VAE = Component("diffusers", ("AutoencoderKLQwenImage",))


class QwenVaeFamily(FlowFamily):
    """A family of flow-matching transformers with the autoencoder of Qwen-Image (Wu et al. 2025, arXiv:2508.02324)."""

    def pixels_per_latent(self, base: Base) -> int:
        """Return the number of pixels per latent along one side, 8."""
        return int(2 ** len(base.vae.temperal_downsample))

    def latents(self, base: Base) -> LatentSpec:
        """Return the channels of the VAE; `posterior` standardizes each of them."""
        return LatentSpec(int(base.vae.config.z_dim), 1.0)

    def posterior(self, base: Base, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures [n, 3, height, width] to mean and standard deviation of their latents, in float32.

        This is a VAE for videos; a picture is a video of one frame.
        """
        found = base.vae.encode(pixels.to(base.vae.device, base.vae.dtype).unsqueeze(2)).latent_dist
        mean, std = found.mean[:, :, 0].float(), found.std[:, :, 0].float()
        center, spread = self._statistics(base, mean)
        return (mean - center) / spread, std / spread

    def decode(self, base: Base, latents: Tensor) -> Tensor:
        """Decode latents [n, c, h, w] to pictures [n, 3, height, width] with values from about -1 to 1."""
        center, spread = self._statistics(base, latents)
        raw = (latents * spread + center).to(base.vae.dtype)
        pixels: Tensor = base.vae.decode(raw.unsqueeze(2)).sample[:, :, 0]
        return pixels

    @staticmethod
    def _statistics(base: Base, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel, [1, c, 1, 1]."""
        config = base.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(like), std.to(like)
