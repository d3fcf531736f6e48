"""Pictures from prompts: a diffusers pipeline, run in small batches with a seed for each picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from diffgraft.bases.pipelines import denoiser_of, is_inpainting, native_pixels
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.image_input import (
    ImageInput,
    ResizedInput,
    inpainting_input,
    native_size,
    prepare_image_input,
    steps_from_image,
)
from diffgraft.progress import phase

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name → diffusers class, and options that are set in addition to the base's noise schedule"""


class OverflowedPictureError(DiffgraftError):
    """Latents overflowed during generation, so that the picture would be black."""


SMALL, SMALL_GUIDANCE = 16, 3.0
"""Width of latents up to which a base counts as small, and the default guidance of such bases: the usual 7.5
oversaturates them"""

_MAX_GUIDANCE, _MAX_SIDE = 100, 8192


@dataclass(frozen=True)
class Settings:
    """Options for drawing; None stands for the base's own value."""

    size: tuple[int, int] | None = None
    """(width, height) in pixels"""
    steps: int = 25
    """Number of denoising steps"""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. None: the pipeline's default, or 3 for small bases"""
    negative: str = ""
    """Negative prompt: what the picture should not show"""
    scheduler: str | None = None
    """Name of a scheduler in `SCHEDULERS`"""
    batch: int | None = None
    """Pictures in a batch; affects speed and memory, not the pictures. None: chosen by their size"""
    tiling: bool = False
    """Whether to decode in overlapping tiles, which saves memory for large pictures; edges of tiles may show"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for values that no base can draw with."""
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.steps < 1:
            raise DiffgraftError(f"Invalid value steps={self.steps}: must be at least 1; 20 to 50 is usual.")
        if self.guidance is not None and not 0 <= self.guidance <= _MAX_GUIDANCE:
            raise DiffgraftError(
                f"Invalid value guidance={self.guidance}: must be 0 to {_MAX_GUIDANCE}; 1 is off, 5 to 9 is usual."
            )
        if self.size is not None and not all(0 < side <= _MAX_SIDE for side in self.size):
            width, height = self.size
            raise DiffgraftError(f"Invalid value size={width}x{height}: sides must be 8 to {_MAX_SIDE} pixels.")


def check_scheduler(name: str) -> None:
    """Raise DiffgraftError if `name` is not in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise DiffgraftError(f"Invalid value scheduler={name!r}: {did_you_mean(name, SCHEDULERS)}")


def use_scheduler(pipe: Any, name: str) -> None:
    """Set the scheduler of `pipe` by name, with the base's noise schedule.

    Raises:
        DiffgraftError: `name` is not in `SCHEDULERS`, or the scheduler does not support the base's noise schedule.
    """
    import diffusers

    check_scheduler(name)
    class_name, options = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    config = pipe.scheduler.config
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in kind().config:
        capable = [
            key
            for key, (other, _) in SCHEDULERS.items()
            if "rescale_betas_zero_snr" in getattr(diffusers, other)().config
        ]
        raise DiffgraftError(
            f"The scheduler {name!r} does not support this base's noise schedule, which has zero terminal SNR. "
            f"Use one of: {', '.join(capable)}."
        )
    pipe.scheduler = kind.from_config(config, **options)


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    settings: Settings,
    seeds: Sequence[int],
    title: str = "drawing",
    keep: Callable[[int, Image.Image], None] | None = None,
    image_input: ImageInput | None = None,
) -> list[Image.Image]:
    """Draw a picture for each prompt and return them in the order of the prompts; the pipeline is left unchanged.

    Args:
        pipe: a diffusers pipeline.
        prompts: a prompt for each picture.
        settings: options for drawing.
        seeds: a seed for each picture, as many as prompts.
        title: name of the phase under which progress is reported.
        keep: callback that receives the index of a picture and the picture as soon as it is drawn.
        image_input: picture that all pictures start from. Unless a size is set, they have its aspect ratio and about
            the base's native number of pixels.

    Raises:
        DiffgraftError: this base cannot draw with the size, steps, scheduler or image input.
        OverflowedPictureError: latents overflowed.
    """
    if is_inpainting(pipe):
        image_input = inpainting_input(pipe, image_input, settings.size)
    if image_input is not None:
        settings = replace(settings, size=settings.size or native_size(pipe, image_input.image))
    arguments = _pipeline_arguments(pipe, settings)
    count = settings.steps if image_input is None else steps_from_image(image_input, settings.steps)
    batch = settings.batch or default_batch_size(arguments["width"], arguments["height"])
    images: list[Image.Image] = []
    starts = range(0, len(prompts), batch)
    with (
        _configured(pipe, settings, image_input, arguments) as (configured_pipe, resized),
        phase(title, len(starts) * count) as tracker,
    ):

        def on_step_end(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not tensors["latents"].isfinite().all():
                raise OverflowedPictureError(
                    f"Latents overflowed in step {step + 1} of {count}, so the picture would be black. Use smaller "
                    "strengths of adapters, less guidance, or float32."
                )
            tracker.advance()
            return tensors

        for start in starts:
            rows = range(start, min(start + batch, len(prompts)))
            drawn = configured_pipe(
                [prompts[row] for row in rows],
                # None for an empty one: pipelines of XL then use zeros as its embedding
                negative_prompt=[settings.negative] * len(rows) if settings.negative else None,
                num_inference_steps=settings.steps,
                generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
                callback_on_step_end=on_step_end,
                **arguments,
                **({} if resized is None else resized.pipeline_arguments(len(rows))),
            ).images
            if resized is not None:
                drawn = [resized.restore_unmasked(image) for image in drawn]
            for row, image in zip(rows, drawn, strict=True):
                if keep is not None:
                    keep(row, image)
            images += drawn
    return images


def default_batch_size(width: int, height: int) -> int:
    """Return the number of pictures of a size in pixels that a batch holds unless `Settings.batch` is set."""
    return max(1, min(32, 8 * 256 * 256 // (width * height)))


@contextmanager
def _configured(
    pipe: Any, settings: Settings, image_input: ImageInput | None, arguments: dict[str, Any]
) -> Iterator[tuple[Any, ResizedInput | None]]:
    """Yield a pipeline with scheduler and tiling set, and the resized input; restore `pipe` afterwards."""
    original_scheduler = pipe.scheduler
    try:
        if settings.scheduler is not None:
            use_scheduler(pipe, settings.scheduler)
        pipe.vae.enable_slicing()
        if settings.tiling:
            pipe.vae.enable_tiling()
        yield (pipe, None) if image_input is None else prepare_image_input(pipe, image_input, arguments)
    finally:
        pipe.scheduler = original_scheduler
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()


def _pipeline_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Return size and guidance as keyword arguments of the pipeline, after checking size and steps."""
    side = native_pixels(pipe)
    width, height = settings.size or (side, side)
    step = math.lcm(pipe.vae_scale_factor, 8)
    if width % step or height % step:
        nearest = "x".join(str(max(step, round(length / step) * step)) for length in (width, height))
        raise DiffgraftError(f"Invalid value size={width}x{height}: sides must be multiples of {step}. Use {nearest}.")
    timesteps = pipe.scheduler.config.num_train_timesteps
    if not 1 <= settings.steps <= timesteps:
        raise DiffgraftError(
            f"Invalid value steps={settings.steps}: this base allows 1 to {timesteps}; 20 to 50 is usual."
        )
    arguments: dict[str, Any] = {"width": width, "height": height}
    if settings.guidance is not None:
        arguments["guidance_scale"] = settings.guidance
    elif denoiser_of(pipe).config.sample_size <= SMALL:
        arguments["guidance_scale"] = SMALL_GUIDANCE
    return arguments
