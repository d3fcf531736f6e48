"""Pictures to latents and back, one at a time, so that the memory is that of one picture."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.pixels import to_image, to_tensor


@torch.no_grad()
def encode(base: Base, images: Sequence[Image.Image]) -> Tensor:
    """Return the latents [n, c, h, w] of RGB pictures of one size: the mean of what the VAE encodes, in float32."""
    return torch.cat([base.family.posterior(base, row.unsqueeze(0))[0] for row in to_tensor(images)])


@torch.no_grad()
def decode(base: Base, latents: Tensor, tiling: bool = False) -> Image.Image:
    """Return the picture of latents [c, h, w].

    Args:
        base: base of the VAE.
        latents: latents of one picture.
        tiling: whether it is decoded in overlapping tiles.
    """
    if tiling:
        base.vae.enable_tiling()
    try:
        pixels = base.family.decode(base, latents.unsqueeze(0))[0]
    finally:
        if tiling:
            base.vae.disable_tiling()
    return to_image(pixels)
