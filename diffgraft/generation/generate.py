"""Pictures from prompts: a diffusers pipeline, run in small batches with one seed a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
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
    batch: int = 8
    """Pictures drawn at once; it changes speed and memory, not what is drawn"""


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
    pipe: Any, prompts: Sequence[str], settings: Settings, seeds: Sequence[int], title: str = "drawing"
) -> list[Image.Image]:
    """One picture for each prompt and seed (two lists of one length); a bar titled `title` shows the steps."""
    if settings.scheduler is not None:
        use_scheduler(pipe, settings.scheduler)
    more: dict[str, Any] = {} if settings.size is None else {"width": settings.size[0], "height": settings.size[1]}
    if settings.guidance is not None:
        more["guidance_scale"] = settings.guidance
    elif pipe.unet.config.sample_size <= SMALL:
        more["guidance_scale"] = SMALL_GUIDANCE
    images: list[Image.Image] = []
    rounds = -(-len(prompts) // settings.batch)
    with tqdm(total=rounds * settings.steps, desc=title, leave=False, unit="step") as bar:

        def tick(_pipe: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return kept

        for rows in _batches(range(len(prompts)), settings.batch):
            generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
            images += pipe(
                [prompts[row] for row in rows],
                negative_prompt=[settings.negative] * len(rows),
                num_inference_steps=settings.steps,
                generator=generators,
                callback_on_step_end=tick,
                **more,
            ).images
    return images


def _batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
