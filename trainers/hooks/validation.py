"""Validation: the loss on pictures never learnt from, at timesteps and noise that are the same in every run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from diffgraft.bases import Framing
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.hooks.validation_set import Probe, probe_of
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.recipe.settings import Validation
from diffgraft.trainers.training_data.samples import Examples

_SEED = 2026
"""Of the timesteps and noises, whatever the recipe's: losses of different runs can be compared"""
_BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Pictures held out, by their size."""

    probes: Sequence[tuple[Probe, Sequence[str], Sequence[Framing]]]
    """Of each size: its pairs, and of each of its pictures the prompt and how it was cut"""

    @torch.no_grad()
    def loss(self, predict: Predict, device: torch.device) -> float:
        """Mean squared error over all pairs, each picture where it counts."""
        total, count = 0.0, 0
        for probe, prompts, frames in self.probes:
            for start in range(0, len(probe.times), _BATCH):
                rows = slice(start, start + _BATCH)
                of = probe.pictures[rows]
                noisy, times = probe.noisy[rows].to(device), probe.times[rows].to(device)
                said = predict(noisy, times, [prompts[one] for one in of], [frames[one] for one in of]).cpu()
                error = (said - probe.target[rows]).square().mean(1, keepdim=True)
                total += float((error * probe.weight[rows]).sum())
            count += len(probe.times)
        return total / count


def held_out(process: ForwardProcess, data: Examples, pairs: int) -> HeldOut:
    """The pairs of `data`: about `pairs`, dealt out evenly, at least one for each picture."""
    encoded, examples = data.encoded, data.examples
    sizes = sorted({encoded.frames[one.rows[0]].size for one in examples})
    probes = []
    for size in sizes:
        own = [one for one in examples if encoded.frames[one.rows[0]].size == size]
        rows = [one.rows[0] for one in own]
        latents = torch.stack([encoded.latents[row][0] for row in rows])
        masks = [encoded.masks[row] for row in rows]
        weight = torch.stack([torch.ones(latents.shape[-2:]) if mask is None else mask for mask in masks])
        each = max(1, round(pairs / len(examples)))
        probe = probe_of(process, latents, weight, each * len(own), _SEED)
        prompts = [one.wording.prompts()[0] for one in own]
        probes.append((probe, prompts, [encoded.frames[row].told() for row in rows]))
    return HeldOut(probes)


@dataclass
class Best:
    """The least held-out loss so far, and for how many validations it has not been bettered."""

    step: int = 0
    loss: float = math.inf
    since: int = field(default=0)

    def take(self, step: int, loss: float) -> bool:
        """Take in a validation; whether it is a new best."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False


@dataclass
class Trial:
    """Validation as the loop sees it."""

    settings: Validation
    loss: Callable[[Predict, torch.device], float]
    keep: Callable[[], None]
    """Called at each new best"""
    best: Best = field(default_factory=Best)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether it is time, after `step` of `steps`."""
        return step % self.settings.every == 0 or step == steps

    def is_over(self) -> bool:
        """Whether nothing has got better for too long."""
        return 0 < self.settings.patience <= self.best.since

    def go_on(self, record: Sequence[dict[str, float]]) -> None:
        """Take up what an earlier part of the run has recorded."""
        for entry in record:
            if "validation" in entry:
                self.best.take(int(entry["step"]), entry["validation"])
