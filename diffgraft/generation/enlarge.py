"""The step between both passes of a hires fix: latents, or decoded pixels, at a larger size."""

from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from diffgraft.bases import Base
from diffgraft.generation.latents import decode, encode
from diffgraft.generation.settings import Hires, Upscaler

_LATENT: dict[str, dict[str, Any]] = {
    "latent": {"mode": "bilinear"},
    "latent nearest": {"mode": "nearest"},
    "latent bicubic": {"mode": "bicubic"},
    "latent antialiased": {"mode": "bilinear", "antialias": True},
}
"""Upscaler of latents → options of PyTorch's `interpolate`, as in webui"""
_PIXELS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def hires_size(base: Base, size: tuple[int, int], hires: Hires) -> tuple[int, int]:
    """Return the (width, height) of the second pass in pixels, rounded to what the base can draw."""
    step = base.size_step
    width, height = (max(step, round(side * hires.scale / step) * step) for side in size)
    return width, height


def enlarged(base: Base, latents: Tensor, size: tuple[int, int], upscaler: Upscaler) -> Tensor:
    """Return latents [n, c, h, w] enlarged to (width, height) in pixels."""
    width, height = (side // base.vae_scale_factor for side in size)
    if upscaler in _LATENT:
        larger: Tensor = interpolate(latents, (height, width), **_LATENT[upscaler])
        return larger
    pictures = [decode(base, row).resize(size, _PIXELS[upscaler]) for row in latents]
    return encode(base, pictures).to(latents)
