"""Pictures from prompts: a diffusers pipeline, run in small batches with one seed a picture."""

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
"""Name → diffusers class and what is set on it beside the base's own schedule."""


class OverflowedPictureError(DiffgraftError):
    """A picture that would be black, as its numbers became too large to be held."""


SMALL, SMALL_GUIDANCE = 16, 3.0
"""Bases whose latents are at most this wide take this guidance: the 7.5 of large models burns their few colours."""


_MOST_GUIDANCE, _LONGEST = 100, 8192


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn. What is None is the base's own."""

    size: tuple[int, int] | None = None
    """(width, height) in pixels"""
    steps: int = 25
    """Denoising steps"""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none. Unset: the pipeline's own, or 3 for small bases"""
    negative: str = ""
    """What the picture should not show"""
    scheduler: str | None = None
    """A name of `SCHEDULERS`"""
    batch: int | None = None
    """Pictures drawn at once; it changes speed and memory, not what is drawn. Unset: by their size"""
    tiling: bool = False
    """Decode pictures in overlapping tiles: less memory for large ones, and edges of tiles may show"""

    def __post_init__(self) -> None:
        """Raises DiffgraftError for what no base can draw with, before one is loaded."""
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.steps < 1:
            raise DiffgraftError(f"Invalid value steps={self.steps}: must be at least 1; 20 to 50 is usual.")
        if self.guidance is not None and not 0 <= self.guidance <= _MOST_GUIDANCE:
            raise DiffgraftError(
                f"Invalid value guidance={self.guidance}: must be 0 to {_MOST_GUIDANCE}; 1 is none, 5 to 9 is usual."
            )
        if self.size is not None and not all(0 < side <= _LONGEST for side in self.size):
            width, height = self.size
            raise DiffgraftError(f"A picture of {width}x{height} cannot be drawn: sides are 8 to {_LONGEST} pixels.")


def check_scheduler(name: str) -> None:
    """Raises DiffgraftError where there is no scheduler called `name`."""
    if name not in SCHEDULERS:
        raise DiffgraftError(f"There is no scheduler {name!r}: {did_you_mean(name, SCHEDULERS)}")


def use_scheduler(pipe: Any, name: str) -> None:
    """Give `pipe` the scheduler called `name`, on the base's own noise schedule.

    Raises:
        DiffgraftError: there is no such scheduler, or it cannot follow this base's schedule.
    """
    import diffusers

    check_scheduler(name)
    class_name, more = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    config = pipe.scheduler.config
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in kind().config:
        able = [
            key
            for key, (other, _) in SCHEDULERS.items()
            if "rescale_betas_zero_snr" in getattr(diffusers, other)().config
        ]
        raise DiffgraftError(
            f"The scheduler {name!r} cannot follow this base's noise schedule, which ends in pure noise. "
            f"Use one of: {', '.join(able)}."
        )
    pipe.scheduler = kind.from_config(config, **more)


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    settings: Settings,
    seeds: Sequence[int],
    title: str = "drawing",
    keep: Callable[[int, Image.Image], None] | None = None,
    source: ImageInput | None = None,
) -> list[Image.Image]:
    """One picture for each prompt and seed (two lists of one length); the steps are a phase called `title`.

    `keep` is called with each picture's place in the lists as soon as it is drawn. With a `source` all of them start
    from its picture; where no size is set it keeps its shape, at about as many pixels as the base was made for. The
    pipeline is left as it was.

    Raises:
        DiffgraftError: size, steps, scheduler or source are none that this base can draw with.
    """
    if is_inpainting(pipe):
        source = inpainting_input(pipe, source, settings.size)
    if source is not None:
        settings = replace(settings, size=settings.size or native_size(pipe, source.image))
    more = _options(pipe, settings)
    count = settings.steps if source is None else steps_from_image(source, settings.steps)
    batch = settings.batch or default_batch_size(more["width"], more["height"])
    images: list[Image.Image] = []
    rounds = range(0, len(prompts), batch)
    with (
        _set_up(pipe, settings, source, more) as (drawing, fitted),
        phase(title, len(rounds) * count) as tracker,
    ):

        def tick(_pipe: Any, step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if not kept["latents"].isfinite().all():
                raise OverflowedPictureError(
                    f"Numbers overflowed in step {step + 1} of {count}, and the picture would be black. Use smaller "
                    "strengths of adapters, less guidance, or float32."
                )
            tracker.advance()
            return kept

        for start in rounds:
            rows = range(start, min(start + batch, len(prompts)))
            drawn = drawing(
                [prompts[row] for row in rows],
                # none at all where nothing is said: XL zeroes what it is told then
                negative_prompt=[settings.negative] * len(rows) if settings.negative else None,
                num_inference_steps=settings.steps,
                generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
                callback_on_step_end=tick,
                **more,
                **({} if fitted is None else fitted.arguments(len(rows))),
            ).images
            if fitted is not None:
                drawn = [fitted.finished(image) for image in drawn]
            for row, image in zip(rows, drawn, strict=True):
                if keep is not None:
                    keep(row, image)
            images += drawn
    return images


def default_batch_size(width: int, height: int) -> int:
    """How many pictures of this size in pixels are drawn at once, where the settings leave it open."""
    return max(1, min(32, 8 * 256 * 256 // (width * height)))


@contextmanager
def _set_up(
    pipe: Any, settings: Settings, source: ImageInput | None, more: dict[str, Any]
) -> Iterator[tuple[Any, ResizedInput | None]]:
    """The pipeline that draws, with the scheduler wanted, and the source as it takes it; `pipe` is put back after."""
    own_scheduler = pipe.scheduler
    try:
        if settings.scheduler is not None:
            use_scheduler(pipe, settings.scheduler)
        pipe.vae.enable_slicing()
        if settings.tiling:
            pipe.vae.enable_tiling()
        yield (pipe, None) if source is None else prepare_image_input(pipe, source, more)
    finally:
        pipe.scheduler = own_scheduler
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()


def _options(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Size and guidance as keyword arguments of the pipeline, checked before anything is drawn."""
    own = native_pixels(pipe)
    width, height = settings.size or (own, own)
    step = math.lcm(pipe.vae_scale_factor, 8)
    if width % step or height % step:
        better = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
        raise DiffgraftError(
            f"A picture of {width}x{height} cannot be drawn: sides are multiples of {step}. Take {better}."
        )
    longest = pipe.scheduler.config.num_train_timesteps
    if not 1 <= settings.steps <= longest:
        raise DiffgraftError(
            f"steps={settings.steps} cannot be drawn: this base has 1 to {longest} steps. Take 20 to 50."
        )
    more: dict[str, Any] = {"width": width, "height": height}
    if settings.guidance is not None:
        more["guidance_scale"] = settings.guidance
    elif denoiser_of(pipe).config.sample_size <= SMALL:
        more["guidance_scale"] = SMALL_GUIDANCE
    return more
