"""Pictures from prompts: a diffusers pipeline, run in small batches with one seed a picture."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from diffgraft.errors import DiffgraftError, nearest

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


SMALL, SMALL_GUIDANCE = 16, 3.0
"""Bases whose latents are at most this wide take this guidance: the 7.5 of large models burns their few colours."""


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


@dataclass(frozen=True)
class Source:
    """A picture to start from instead of noise alone (image to image), or to draw into (inpainting)."""

    image: Image.Image
    denoise: float = 0.7
    """How far it is taken back to noise: near 0 it stays as it is, at 1 nothing of it is left. diffusers says
    `strength`, which here is an adapter's"""
    mask: Image.Image | None = None
    """As large as the picture: white where it is drawn anew, black where it stays"""


def use_scheduler(pipe: Any, name: str) -> None:
    """Give `pipe` the scheduler called `name`, on the base's own noise schedule.

    Raises:
        DiffgraftError: there is no such scheduler, or it cannot follow this base's schedule.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise DiffgraftError(f"There is no scheduler {name!r}: {nearest(name, SCHEDULERS)}")
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
    source: Source | None = None,
) -> list[Image.Image]:
    """One picture for each prompt and seed (two lists of one length); a bar titled `title` shows the steps.

    `keep` is called with each picture's place in the lists as soon as it is drawn. With a `source` all of them start
    from its picture; where no size is set it keeps its shape, at about as many pixels as the base was made for. The
    pipeline is left as it was.

    Raises:
        DiffgraftError: size, steps, scheduler or source are none that this base can draw with.
    """
    if source is not None:
        settings = replace(settings, size=settings.size or _own_shape(pipe, source.image))
    more = _options(pipe, settings)
    count = settings.steps if source is None else _steps_from(source, settings.steps)
    pixels = more["width"] * more["height"]
    batch = settings.batch or max(1, min(32, 8 * 256 * 256 // pixels))
    images: list[Image.Image] = []
    rounds = range(0, len(prompts), batch)
    with (
        _set_up(pipe, settings, source, more) as (drawing, fitted),
        tqdm(total=len(rounds) * count, desc=title, leave=False, unit="step") as bar,
    ):

        def tick(_pipe: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            bar.update()
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


@contextmanager
def _set_up(
    pipe: Any, settings: Settings, source: Source | None, more: dict[str, Any]
) -> Iterator[tuple[Any, "_Fitted | None"]]:
    """The pipeline that draws, with the scheduler wanted, and the source as it takes it; `pipe` is put back after."""
    own_scheduler = pipe.scheduler
    try:
        if settings.scheduler is not None:
            use_scheduler(pipe, settings.scheduler)
        pipe.vae.enable_slicing()
        yield (pipe, None) if source is None else _from_source(pipe, source, more)
    finally:
        pipe.scheduler = own_scheduler
        pipe.vae.disable_slicing()


@dataclass(frozen=True)
class _Fitted:
    """A source in the size that is drawn."""

    image: Image.Image
    mask: Image.Image | None
    denoise: float

    def arguments(self, count: int) -> dict[str, Any]:
        """What diffusers' pipelines are told for `count` pictures."""
        masks = {} if self.mask is None else {"mask_image": [self.mask] * count}
        return {"image": [self.image] * count, "strength": self.denoise, **masks}

    def finished(self, drawn: Image.Image) -> Image.Image:
        """What was drawn, with the very pixels of the source where it stays: the VAE has changed them a little."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


def _from_source(pipe: Any, source: Source, more: dict[str, Any]) -> tuple[Any, _Fitted]:
    """The pipeline for a source, over the same modules, and the source in its size."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    size = (more["width"], more["height"])
    image = ImageOps.fit(source.image.convert("RGB"), size, Image.Resampling.LANCZOS)
    mask = None
    if source.mask is not None:
        if source.mask.size != source.image.size:
            sizes = ["x".join(map(str, image.size)) for image in (source.mask, source.image)]
            raise DiffgraftError(f"The mask is {sizes[0]} and the picture {sizes[1]}: they must be of one size.")
        mask = ImageOps.fit(_on_black(source.mask), size, Image.Resampling.BILINEAR)
        if mask.getextrema() == (0, 0):
            raise DiffgraftError("The mask is black everywhere, so nothing would be drawn: paint white what should be.")
    kind = AutoPipelineForImage2Image if mask is None else AutoPipelineForInpainting
    drawing = kind.from_pipe(pipe)
    drawing.set_progress_bar_config(disable=True)
    if mask is None:  # it takes the size from the picture
        del more["width"], more["height"]
    return drawing, _Fitted(image, mask, source.denoise)


def _on_black(mask: Image.Image) -> Image.Image:
    """A mask as "L"; what is transparent in it counts as black."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    painted = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), painted).convert("L")


def _own_shape(pipe: Any, image: Image.Image) -> tuple[int, int]:
    """The picture's shape, at about as many pixels as the base was made for."""
    own, step = pipe.unet.config.sample_size * pipe.vae_scale_factor, lcm(pipe.vae_scale_factor, 8)
    zoom = own / (image.width * image.height) ** 0.5
    width, height = (max(step, round(side * zoom / step) * step) for side in image.size)
    return width, height


def _steps_from(source: Source, steps: int) -> int:
    """How many of the steps are left from where a source is taken back to."""
    if not 0 < source.denoise <= 1:
        raise DiffgraftError(f"denoise={source.denoise} will not do: it is above 0 and at most 1. Take 0.5 to 0.8.")
    if int(steps * source.denoise) < 1:
        raise DiffgraftError(f"denoise={source.denoise} leaves none of {steps} steps. Raise one of them.")
    return min(steps, int(steps * source.denoise))


def _options(pipe: Any, settings: Settings) -> dict[str, Any]:
    """Size and guidance as keyword arguments of the pipeline, checked before anything is drawn."""
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    width, height = settings.size or (own, own)
    step = lcm(pipe.vae_scale_factor, 8)
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
    elif pipe.unet.config.sample_size <= SMALL:
        more["guidance_scale"] = SMALL_GUIDANCE
    return more
