"""What drawing needs to know of a pipeline, whatever its denoiser is."""

from typing import Any

from torch import nn

from diffgraft.bases.prediction import PREDICTION_KEY, PREDICTIONS
from diffgraft.bases.registry import denoisers


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a diffusers pipeline, or of a base."""
    return next(found for name in denoisers() if (found := getattr(pipe, name, None)) is not None)


def as_denoiser(module: nn.Module) -> dict[str, nn.Module]:
    """A bare denoiser under the name that adapters know: that of a UNet, which has down and up blocks."""
    first, *others = denoisers()
    name = first if hasattr(module, "down_blocks") or not others else others[0]
    return {name: module}


def native_pixels(pipe: Any) -> int:
    """Side in pixels of the pictures that a pipeline's denoiser was made for."""
    return int(denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor)


def is_inpainting(pipe: Any) -> bool:
    """Whether the denoiser is told, beside the noisy latents, where to draw and what stays."""
    channels = getattr(denoiser_of(pipe).config, "in_channels", 0)
    return bool(hasattr(denoiser_of(pipe), "down_blocks") and channels > pipe.vae.config.latent_channels)


def predicted(target: Any) -> str:
    """What the denoiser of a pipeline or base predicts, as its scheduler says; empty where it says nothing known."""
    scheduler = getattr(target, "scheduler", None)
    said = scheduler.config.get(PREDICTION_KEY) if scheduler is not None else None
    return str(said) if said in PREDICTIONS else ""
