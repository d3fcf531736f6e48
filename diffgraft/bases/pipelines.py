"""Properties of diffusers pipelines, whatever their denoiser."""

from typing import Any

from torch import nn

from diffgraft.bases.prediction import PREDICTION_KEY, PREDICTIONS
from diffgraft.bases.registry import denoiser_name, denoisers


def denoiser_of(pipe: Any) -> Any:
    """Return the denoiser of a diffusers pipeline or of a base."""
    return next(module for name in denoisers() if (module := getattr(pipe, name, None)) is not None)


def as_denoiser(module: nn.Module) -> dict[str, nn.Module]:
    """Return a bare denoiser under its name in adapter paths; modules with ``down_blocks`` are UNets.

    Others have the name that `denoiser_name` finds by their class.
    """
    return {"unet" if hasattr(module, "down_blocks") else denoiser_name(module): module}


def native_pixels(pipe: Any) -> int:
    """Return the native side of a pipeline's pictures in pixels."""
    return int(denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor)


def is_inpainting(pipe: Any) -> bool:
    """Whether the denoiser also takes a mask and the latents of the masked picture."""
    channels = getattr(denoiser_of(pipe).config, "in_channels", 0)
    return bool(hasattr(denoiser_of(pipe), "down_blocks") and channels > pipe.vae.config.latent_channels)


def prediction_of(target: Any) -> str:
    """Return the prediction type in the scheduler of a pipeline or base; empty if there is no known one."""
    scheduler = getattr(target, "scheduler", None)
    prediction_type = scheduler.config.get(PREDICTION_KEY) if scheduler is not None else None
    return str(prediction_type) if prediction_type in PREDICTIONS else ""
