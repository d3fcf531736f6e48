"""Null-text inversion: noise and negative prompts from which a sampler draws a given picture, so that it can be edited.

Mokady et al. 2022, arXiv:2211.09794. The picture is taken to noise by running DDIM backwards without guidance (Song et
al. 2020, arXiv:2010.02502, section 4.3). With guidance the way back would end elsewhere; in each step the states of the
empty negative prompt are optimized until it meets the first way again.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.strengths import Strength
from diffgraft.bases import Base
from diffgraft.bases.family import Conditioning
from diffgraft.errors import DiffgraftError
from diffgraft.generation.attention_control import Edit, control_of, controlled, one_chunk, record_of
from diffgraft.generation.guided import Guide, GuidedDenoiser, Told, noise_levels
from diffgraft.generation.image_input import ImageInput, native_size
from diffgraft.generation.latents import decode, encode
from diffgraft.generation.metadata import told_by
from diffgraft.generation.samplers.k_diffusion import euler
from diffgraft.generation.samplers.schedules import schedule_sigmas
from diffgraft.generation.sampling import Job, Pass
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import phase

_MOST_INNER = 1000
"""Number of optimizer steps in each step that `invert` accepts"""
_RATE, _ENOUGH = 1e-2, 1e-5
"""Learning rate of the first step, which falls to half of it, and the loss in latents below which a step is done"""


@dataclass(frozen=True)
class Inversion:
    """A picture as the start of a sampler."""

    prompt: str
    noise: Tensor
    """Latents at the first noise level, [1, c, h, w]"""
    negatives: Sequence[Tensor]
    """Hidden states of the negative prompt in each step, [tokens, width]"""
    settings: DrawSettings
    source: ImageInput
    """The picture at the size at which it is drawn"""
    inner: int
    """Number of optimizer steps in each step at most"""
    adapters: Mapping[str, Strength]
    """Adapters that were in use, and their strengths"""


def invert(
    session: Session, image: Image.Image, prompt: str, settings: DrawSettings | None = None, inner: int = 10
) -> Inversion:
    """Find noise and negative prompts from which a picture is drawn again.

    Args:
        session: session whose base and adapters draw.
        image: picture.
        prompt: description of the picture, without tags, parts and changes between steps.
        settings: steps, guidance and size of the drawing; the sampler is DDIM.
        inner: number of optimizer steps in each step at most; 0: no optimization.

    Raises:
        DiffgraftError: the prompt has parts or changes, or `inner` is out of its range.
    """
    base, settings = session.base, settings or DrawSettings()
    if not isinstance(inner, int) or not 0 <= inner <= _MOST_INNER:
        raise DiffgraftError(f"Invalid value inner={inner!r}: must be a whole number from 0 to {_MOST_INNER}.")
    settings = replace(
        settings, sampler="ddim", schedule=None, regions=(), hires=None, size=settings.size or native_size(base, image)
    )
    assert settings.size is not None
    sigmas = schedule_sigmas("ddim", settings.steps, noise_levels(base))
    for text in (prompt, settings.negative):
        one_chunk(base, text)
    guide = session.painter.guide(prompt, settings)
    if len(guide.parts) != 1 or len(guide.parts[0][1]) != 1:
        raise DiffgraftError(f"The prompt {prompt!r} has parts or changes between steps: describe the picture plainly.")
    way = _Way(base, guide.parts[0][1][0], guide.negative[0], session.painter.guidance(settings).scale)
    source = ImageInput(image, 1.0).resized(settings.size)
    with phase("inverting", 2 * (len(sigmas) - 1)) as tracker:
        points = [encode(base, [source.image])]
        for low, high in pairwise(reversed(sigmas)):
            points.append(way.raised(points[-1], low, high))
            tracker.advance()
        points.reverse()
        x, negative, negatives = points[0], way.negative.states, []
        for (before, after), goal in zip(pairwise(sigmas), points[1:], strict=True):
            negative = way.optimized(x, (before, after), negative, goal, inner)
            with torch.no_grad():
                x = way.lowered(x, before, after, negative)
            negatives.append(negative)
            tracker.advance()
    return Inversion(prompt, points[0], negatives, settings, source, inner, _strengths(session))


def redraw(
    session: Session, inversion: Inversion, edited_prompt: str | None = None, change: Edit | None = None
) -> tuple[Image.Image, ...]:
    """Draw an inverted picture, and beside it an edited one.

    Args:
        session: session with the base and adapters of `invert`.
        inversion: result of `invert`.
        edited_prompt: prompt of the edited picture; None: only the picture itself.
        change: how much of the picture is kept, see `diffgraft.generation.attention_control`.

    Returns:
        The picture, and the edited one if there is a prompt for it; `Image.info` tells how they were drawn.
    """
    base, settings = session.base, inversion.settings
    prompts = [inversion.prompt] if edited_prompt is None else [inversion.prompt, edited_prompt]
    guides = []
    for prompt in prompts:
        guide = session.painter.guide(prompt, settings)
        own = [replace(guide.negative[0], until=step, states=row) for step, row in enumerate(inversion.negatives)]
        guides.append(Guide(guide.parts, own))
    denoise = GuidedDenoiser(base, guides, session.painter.guidance(settings))
    sigmas = schedule_sigmas("ddim", settings.steps, denoise.levels)
    control = None
    if edited_prompt is not None:
        control = control_of(base, inversion.prompt, edited_prompt, change or Edit(), settings.steps)
    x = inversion.noise.expand(len(prompts), -1, -1, -1)
    with (
        controlled(base.denoiser, control) if control else nullcontext(),
        phase("drawing", settings.steps) as tracker,
    ):
        for step, latents in enumerate(euler(denoise, x, sigmas, _no_noise), 1):
            x = latents
            denoise.step = step
            if control is not None:
                control.advance(step)
            tracker.advance()
    pictures = tuple(decode(base, row) for row in x)
    assert settings.size is not None
    work = Pass(
        [Job(place, prompt, 0) for place, prompt in enumerate(prompts)], settings, settings.size, settings.steps
    )
    edit = record_of(change or Edit() if edited_prompt is not None else Edit(0, 0), inversion.inner)
    records = session.records(work, inversion.source, list(session.adapters.items()))
    for picture, record in zip(pictures, records, strict=True):
        is_complete = record.is_complete and inversion.adapters == _strengths(session)
        picture.info |= told_by(replace(record, edit=edit, is_complete=is_complete))
    return pictures


def _strengths(session: Session) -> dict[str, Strength]:
    return {name: item.strength for name, item in session.adapters.items()}


def _no_noise(_before: float, _after: float) -> Tensor:
    raise AssertionError("DDIM draws no noise")


@dataclass(frozen=True)
class _Way:
    """DDIM in both directions for one prompt, in the convention x₀ + σ · ε."""

    base: Base
    told: Told
    negative: Told
    scale: float
    """Scale of guidance"""

    @torch.no_grad()
    def raised(self, x: Tensor, low: float, high: float) -> Tensor:
        """Return the latents one step nearer to noise, without guidance.

        As in the authors' code the denoiser is asked at the higher level, about latents with the variance of it.
        """
        alpha_at = self.base.parameterization.alpha_at
        as_if = x * (alpha_at(low) / alpha_at(high))
        return x + self._slope(as_if, high, self.told.states, self.told) * (high - low)

    def lowered(self, x: Tensor, before: float, after: float, negative: Tensor) -> Tensor:
        """Return the latents after one step with guidance, for hidden states of the negative prompt."""
        with torch.no_grad():
            own = self._slope(x, before, self.told.states, self.told)
        empty = self._slope(x, before, negative, self.negative)
        return x + (empty + self.scale * (own - empty)) * (after - before)

    def optimized(self, x: Tensor, levels: tuple[float, float], start: Tensor, goal: Tensor, inner: int) -> Tensor:
        """Return hidden states of the negative prompt with which a step leads to `goal`."""
        before, after = levels
        states = start.detach().float().clone().requires_grad_()
        adam = torch.optim.Adam([states], lr=_RATE)
        scale = (1 + after**2) ** 0.5  # latents of the paper have the variance of noise
        for step in range(inner):
            for group in adam.param_groups:
                group["lr"] = _RATE * (1 - step / (2 * inner))
            with torch.enable_grad():
                reached = self.lowered(x, before, after, states.to(start.dtype))
                loss = ((reached - goal) / scale).square().mean()
            (states.grad,) = torch.autograd.grad(loss, [states])
            adam.step()
            if float(loss.detach()) < _ENOUGH:
                break
        return states.detach().to(start.dtype)

    def _slope(self, x: Tensor, sigma: float, states: Tensor, told: Told) -> Tensor:
        """Return the predicted noise (x − x₀) / σ [1, c, h, w]."""
        parameterization = self.base.parameterization
        added = {name: value.unsqueeze(0) for name, value in told.added.items()}
        time = torch.tensor([noise_levels(self.base).timestep(sigma)], device=x.device)
        given = x * parameterization.alpha_at(sigma)
        prediction = self.base.denoise(given, time, Conditioning(states.unsqueeze(0), added)).to(x.dtype)
        return (x - parameterization.x0_at(x, prediction, sigma)) / sigma
