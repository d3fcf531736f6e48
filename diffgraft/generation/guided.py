"""The denoiser as samplers see it: clean latents at a noise level, guided by prompts that change between steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.family import Conditioning
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
    """The parts of one picture's prompt, and its negative prompt."""

    parts: Sequence[tuple[float, Sequence[Told]]]
    """Weight of each part, and what it tells, by step"""
    negative: Sequence[Told]


def noise_levels(base: Base) -> NoiseLevels:
    """Return the noise levels of a base in the convention x₀ + σ · ε, where a flow's σ is s / (1 − s)."""
    parameterization = base.parameterization
    signal = parameterization.alphas.double().square().numpy()
    noise = parameterization.sigmas.double().square().numpy()
    signal = np.maximum(signal, _LEAST_SIGNAL)
    return NoiseLevels(np.sqrt(noise / signal), is_xl=base.family.name == "sdxl")


class GuidedDenoiser:
    """Predicts clean latents of n pictures, each with its own prompt; `step` says which texts count.

    Several parts of a prompt are composed (Liu et al. 2022, arXiv:2206.01714, equation 11); one part of weight 1 is
    classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, equation 6).
    """

    def __init__(
        self, base: Base, guides: Sequence[Guide], guidance: float, rescale: float = 0.0, size: Tensor | None = None
    ) -> None:
        """Prepare a batch.

        Args:
            base: base that draws.
            guides: prompts of each picture.
            guidance: scale of guidance; at 1 prompts of one part of weight 1 need no negative prompt.
            rescale: share of the prediction's standard deviation that is taken from the unguided one, from 0 to 1 (Lin
                et al. 2023, arXiv:2305.08891, section 3.4).
            size: micro-conditioning of one picture [6], for families with it.
        """
        self.step = 0
        self.levels, self._parameterization = noise_levels(base), base.parameterization
        self._base, self._guides, self._guidance, self._rescale, self._size = base, guides, guidance, rescale, size
        weights = [weight for guide in guides for weight, _ in guide.parts]
        self._is_guided = guidance != 1 or any(weight != 1 for weight in weights) or len(weights) > len(guides)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Return predicted clean latents [n, c, h, w] for x = x₀ + σ · ε."""
        rows, told = [], []
        for row, guide in enumerate(self._guides):
            now = [self._now(stages) for _, stages in guide.parts]
            now += [self._now(guide.negative)] if self._is_guided else []
            rows += [row] * len(now)
            told += now
        predictions = self._predict(x, sigma, rows, told)
        if self._is_guided:
            predictions = torch.stack([self._guided(row, predictions, rows) for row in range(len(x))])
        return self._parameterization.x0_at(x, predictions, sigma)

    def _now(self, stages: Sequence[Told]) -> Told:
        return next((stage for stage in stages if self.step <= stage.until), stages[-1])

    def _predict(self, x: Tensor, sigma: float, rows: Sequence[int], told: Sequence[Told]) -> Tensor:
        """Return the predictions for `told` [m, c, h, w]; prompts of unequal length are run apart."""
        alpha = self._parameterization.alpha_at(sigma)
        found: dict[int, Tensor] = {}
        for length in dict.fromkeys(len(item.states) for item in told):
            places = [place for place, item in enumerate(told) if len(item.states) == length]
            latents = torch.stack([x[rows[place]] for place in places])
            added = {name: torch.stack([told[place].added[name] for place in places]) for name in told[places[0]].added}
            if self._size is not None:
                added["time_ids"] = self._size.expand(len(places), -1)
            states = Conditioning(torch.stack([told[place].states for place in places]), added)
            times = torch.full((len(places),), self.levels.timestep(sigma), device=x.device)
            found |= zip(places, self._base.denoise(latents * alpha, times, states).to(x.dtype), strict=True)
        return torch.stack([found[place] for place in range(len(told))])

    def _guided(self, row: int, predictions: Tensor, rows: Sequence[int]) -> Tensor:
        """Compose the predictions of one picture, of which the last is that for the negative prompt."""
        *of_parts, negative = (prediction for prediction, own in zip(predictions, rows, strict=True) if own == row)
        guided: Tensor = negative
        for (weight, _), prediction in zip(self._guides[row].parts, of_parts, strict=True):
            guided = guided + self._guidance * weight * (prediction - negative)
        if self._rescale:
            guided = guided * (self._rescale * of_parts[0].std() / guided.std() + 1 - self._rescale)
        return guided
