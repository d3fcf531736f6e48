"""The denoiser as samplers see it: clean latents at a noise level, guided by prompts that change between steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.family import Conditioning
from diffgraft.generation.control import StepControl
from diffgraft.generation.lanes import Lanes
from diffgraft.generation.samplers.schedules import NoiseLevels

_LEAST_SIGNAL = 2.0**-24
"""ᾱ of the last timestep where a schedule has none (zero terminal SNR), as in diffusers"""


@dataclass(frozen=True)
class Told:
    """What one part of a prompt tells the denoiser in the steps up to one."""

    until: int
    """Last step; as in webui, steps are counted from 0 here, so that a change after step 1 comes after two steps"""
    states: Tensor
    """Hidden states, [tokens, width]"""
    added: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors of the conditioning, such as pooled embeddings"""


@dataclass(frozen=True)
class Guide:
    """The encoded prompt of one picture, in parts and by step, and its negative prompt."""

    parts: Sequence[tuple[float, Sequence[Told]]]
    """Weight of each part, and what it tells, by step"""
    negative: Sequence[Told]
    lane: int = -1
    """Lane of the adapters that act on it beside the merged ones, -1 for none"""
    areas: "Sequence[Area]" = ()
    """Regions of the picture with prompts of their own"""


@dataclass(frozen=True)
class Area:
    """A region of a picture: predictions are averaged by place (Bar-Tal et al. 2023, arXiv:2302.08113, equation 5)."""

    weights: Tensor
    """Its weight at each place, [1, h, w]"""
    guide: Guide
    alone_until: float = 0.0
    """Step up to which it is predicted as a picture of its own, so that its subject lies inside of it"""

    def window(self, step: int) -> "Window | None":
        """Return the part of the latents that is predicted in a step, None for all of them."""
        return self._spans if step < self.alone_until else None

    @cached_property
    def _spans(self) -> "Window":
        spans = []
        for axis in (2, 1):
            inside = self.weights.amax((0, axis)).nonzero().flatten()
            first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, self.weights.shape[3 - axis])
            size = self.weights.shape[3 - axis]
            spans.append(slice(first // _GRID * _GRID, min(size, -(-last // _GRID) * _GRID)))
        return spans[0], spans[1]


@dataclass(frozen=True)
class Guidance:
    """How the predictions for a prompt and for its negative prompt become one."""

    scale: float
    """Scale of classifier-free guidance; at 1 prompts of one part of weight 1 need no negative prompt"""
    rescale: float = 0.0
    """Share of the prediction's standard deviation that is taken from the unguided one, from 0 to 1 (Lin et al. 2023,
    arXiv:2305.08891, section 3.4)"""
    mimic: float | None = None
    """Scale whose range of values the guided prediction is brought to (dynamic thresholding); None: off"""
    percentile: float = 1.0
    """With `mimic`, share of the values of a channel that are not clipped"""


@dataclass(frozen=True)
class Kept:
    """Latents of a picture that stay where its mask is 0: the prediction there is always them."""

    latents: Tensor
    """[1 or n, c, h, w]"""
    mask: Tensor
    """1 where the picture is redrawn, [1, 1, h, w]"""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the denoiser besides latents and prompts, the same for all pictures of a batch."""

    size: Tensor | None = None
    """Micro-conditioning of one picture [6], for families with it"""
    channels: Tensor | None = None
    """Further channels of an inpainting denoiser's input [1, c, h, w]"""
    control: StepControl | None = None
    """Condition picture with its control network"""
    guidance: Tensor | None = None
    """Guidance that a distilled denoiser reads [1]"""


Window = tuple[slice, slice]
"""Rows and columns of latents"""
_GRID = 8
"""Windows begin and end at multiples of it, as UNets halve their latents up to three times"""


def noise_levels(base: Base) -> NoiseLevels:
    """Return the noise levels of a base in the convention x₀ + σ · ε, where a flow's σ is s / (1 − s)."""
    parameterization = base.parameterization
    signal = parameterization.alphas.double().square().numpy()
    noise = parameterization.sigmas.double().square().numpy()
    signal = np.maximum(signal, _LEAST_SIGNAL)
    return NoiseLevels(np.sqrt(noise / signal), is_xl=base.family.name == "sdxl")


class GuidedDenoiser:
    """Predicts clean latents of n pictures, each with its own prompt.

    Prompts may change between steps: set `step`, counted from 0, before the predictions of a step.

    Several parts of a prompt are composed (Liu et al. 2022, arXiv:2206.01714, equation 11); one part of weight 1 is
    classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, equation 6).
    """

    def __init__(
        self,
        base: Base,
        guides: Sequence[Guide],
        guidance: Guidance,
        inputs: Inputs = Inputs(),
        kept: Kept | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        """Prepare a batch.

        Args:
            base: base that draws.
            guides: prompts of each picture.
            guidance: how the predictions are put together.
            inputs: inputs of the denoiser besides latents and prompts.
            kept: latents that stay as they are, for other denoisers.
            lanes: adapters of single guides.
        """
        self.step = 0
        self.clean: Tensor | None = None
        """The last prediction"""
        self.levels, self._parameterization = noise_levels(base), base.parameterization
        self._base, self._guidance = base, guidance
        self._inputs, self._kept, self._lanes = inputs, kept, lanes
        self._layers = [(row, *layer) for row, guide in enumerate(guides) for layer in _layers(guide)]
        """Picture, guide, its weight at each place, and its region, of everything that is predicted"""
        weights = [weight for _, guide, _, _ in self._layers for weight, _ in guide.parts]
        is_plain = all(weight == 1 for weight in weights) and len(weights) == len(self._layers)
        self._is_guided = guidance.scale != 1 or not is_plain

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return predicted clean latents [n, c, h, w] for x = x₀ + σ · ε."""
        asked = [
            _Asked(row, guide.lane, self._now(stages), None if area is None else area.window(self.step))
            for row, guide, _, area in self._layers
            for stages in [*(stages for _, stages in guide.parts), *([guide.negative] if self._is_guided else [])]
        ]
        waiting = iter(self._predict(x, sigma, asked))
        predictions = torch.zeros_like(x)
        for row, guide, weights, area in self._layers:
            own = [next(waiting) for _ in range(len(guide.parts) + self._is_guided)]
            guided = self._guided(guide, own) if self._is_guided else own[0]
            window = None if area is None else area.window(self.step)
            if window is None:
                predictions[row] += weights.to(x) * guided
            else:
                predictions[row][:, window[0], window[1]] += weights[:, window[0], window[1]].to(x) * guided
        clean = self._parameterization.x0_at(x, predictions, sigma)
        if self._kept is not None:
            mask = self._kept.mask.to(clean)
            clean = clean * mask + self._kept.latents.to(clean) * (1 - mask)
        self.clean = clean
        return clean

    def _now(self, stages: Sequence[Told]) -> Told:
        return next((stage for stage in stages if self.step <= stage.until), stages[-1])

    def _predict(self, x: Tensor, sigma: float, asked: "Sequence[_Asked]") -> list[Tensor]:
        """Return the predictions for `asked`, each [c, h, w]; prompts and windows of unequal size are run apart."""
        alpha = self._parameterization.alpha_at(sigma)
        found: dict[int, Tensor] = {}
        kinds = [(len(item.told.states), str(item.window)) for item in asked]
        for kind in dict.fromkeys(kinds):
            places = [place for place, own in enumerate(kinds) if own == kind]
            told = [asked[place].told for place in places]
            latents = torch.stack([_inside(x[asked[place].row], asked[place].window) for place in places])
            added = {name: torch.stack([item.added[name] for item in told]) for name in told[0].added}
            inputs, window, control = self._inputs, asked[places[0]].window, None
            if inputs.size is not None:
                added["time_ids"] = inputs.size.expand(len(places), -1)
            if inputs.guidance is not None:
                added["guidance"] = inputs.guidance.expand(len(places))
            channels = inputs.channels
            if channels is not None:
                channels = _inside(channels, window).expand(len(places), -1, -1, -1)
            if inputs.control is not None:
                control = inputs.control.signal(self.step, window, len(places))
            states = Conditioning(torch.stack([item.states for item in told]), added, channels, control)
            times = torch.full((len(places),), self.levels.timestep(sigma), device=x.device)
            if self._lanes is not None:
                self._lanes.rows = [asked[place].lane for place in places]
            found |= zip(places, self._base.denoise(latents * alpha, times, states).to(x), strict=True)
        return [found[place] for place in range(len(asked))]

    def _guided(self, guide: Guide, predictions: Sequence[Tensor]) -> Tensor:
        """Compose the predictions for one guide, of which the last is that for the negative prompt."""
        *of_parts, negative = predictions
        towards = torch.zeros_like(negative)
        for (weight, _), prediction in zip(guide.parts, of_parts, strict=True):
            towards = towards + weight * (prediction - negative)
        rule = self._guidance
        guided = self._base.family.normed_guidance(negative + rule.scale * towards, negative + towards)
        if rule.mimic is not None:
            guided = with_range_of(guided, negative + rule.mimic * towards, rule.percentile)
        if rule.rescale:
            guided = guided * (rule.rescale * of_parts[0].std() / guided.std() + 1 - rule.rescale)
        return guided


class _Asked(NamedTuple):
    """One prediction to make."""

    row: int
    """Its picture"""
    lane: int
    told: Told
    window: Window | None


def _inside(values: Tensor, window: Window | None) -> Tensor:
    return values if window is None else values[..., window[0], window[1]]


def _layers(guide: Guide) -> Iterator[tuple[Guide, Tensor, Area | None]]:
    """Yield what is predicted for a picture, its own prompt and its regions, with weights that add up to 1."""
    if not guide.areas:
        yield guide, torch.ones(1, 1, 1), None
        return
    total = torch.stack([area.weights for area in guide.areas]).sum(0)
    rest = (1 - total).clamp_min(0)
    if bool(rest.any()):
        yield guide, rest / (rest + total), None
    yield from ((area.guide, area.weights / (rest + total), area) for area in guide.areas)


def with_range_of(guided: Tensor, mimicked: Tensor, percentile: float = 1.0) -> Tensor:
    """Bring each channel's values to the range of another prediction: dynamic thresholding in latents.

    Saharia et al. 2022, arXiv:2205.11487, section 2.3, clip pixels at a percentile of their magnitude and divide by it.
    Latents have no range of their own, so that, as in the extension "dynamic thresholding" of webui and ComfyUI
    (its scale mimicry with separate channels and the mean as start), that of a smaller guidance takes its place.

    Args:
        guided: prediction of the full guidance, [c, h, w].
        mimicked: prediction of the smaller guidance, [c, h, w].
        percentile: share of the magnitudes of a channel up to which values are not clipped.
    """
    flat, goal = guided.flatten(1), mimicked.flatten(1)
    mean = flat.mean(1, keepdim=True)
    centred = flat - mean
    limit = (goal - goal.mean(1, keepdim=True)).abs().amax(1, keepdim=True)
    own = centred.abs().quantile(percentile, 1, keepdim=True)
    most = torch.maximum(limit, own)
    clipped = centred.clamp(-most, most) / most.clamp_min(torch.finfo(most.dtype).tiny) * limit
    return (clipped + mean).view_as(guided)
