"""Validation: the loss on pictures never learnt from, at timesteps and noise that are the same in every run."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from diffgraft.bases import SizeConditioning
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.hooks.artifacts import PeriodicArtifact
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Entry, Metrics
from diffgraft.trainers.hooks.validation_set import Probe, probe_of
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.recipe.settings import Validation
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.state import TrainingState
from diffgraft.trainers.training_data.examples import Examples

_SEED = 2026
"""Of the timesteps and noises, whatever the recipe's: losses of different runs can be compared"""
_BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Pictures held out, by their size."""

    probes: Sequence[tuple[Probe, Sequence[str], Sequence[SizeConditioning]]]
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
        probes.append((probe, prompts, [encoded.frames[row].size_conditioning() for row in rows]))
    return HeldOut(probes)


@dataclass
class BestTracker:
    """The least held-out loss so far, and for how many validations it has not been bettered."""

    step: int = 0
    loss: float = math.inf
    since: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Take in a validation; whether it is a new best."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def restore(self, entries: Sequence[Entry]) -> None:
        """Take up what an earlier part of the run has recorded."""
        for entry in entries:
            if "validation" in entry:
                self.update(int(entry["step"]), entry["validation"])


class ValidationHook(Hook):
    """Validates every so many steps, keeps the best adapter, and ends a run that gets no better."""

    name = "validation"

    def __init__(
        self, settings: Validation, held: HeldOut, predict: Predict, metrics: Metrics, best: PeriodicArtifact
    ) -> None:
        """`best` writes the adapter of each new best."""
        self.every, self._patience = settings.every, settings.patience
        self._held, self._predict, self._metrics, self._keep = held, predict, metrics, best
        self._best = BestTracker()

    def begin(self, state: TrainingState) -> None:
        self._best.restore(self._metrics.entries)
        state.has_converged = self._is_over()

    def is_missed(self, state: TrainingState) -> bool:
        return self.is_due(state, ()) and "validation" not in self._metrics.entries[-1]

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.step > 0 and (state.is_due(self.every) or state.step == state.steps)

    def run(self, state: TrainingState) -> None:
        """Record the held-out loss, the same number on all processes; a new best is kept."""
        accelerator = state.accelerator
        with state.eval_weights():
            own = torch.tensor(self._held.loss(self._predict, accelerator.device), device=accelerator.device)
            loss = float(accelerator.reduce(own.float(), "mean"))
            if self._best.update(state.step, loss):
                self._keep.write(state.step)
        entry = {"step": float(state.step), "validation": loss}
        with defer_sigint():
            self._metrics.add({**entry, "step": state.step})
        self._metrics.announce(entry)
        state.has_converged = self._is_over()

    def _is_over(self) -> bool:
        return 0 < self._patience <= self._best.since
