"""Validation: the loss on held-out images, at timesteps and noise that are equal in every run."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from diffgraft.bases import SizeConditioning
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.trainers.hooks.artifacts import PeriodicArtifact
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Entry, Metrics
from diffgraft.trainers.hooks.validation_set import ValidationSet, validation_set_from_latents
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.recipe.settings import Validation
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.state import TrainingState
from diffgraft.trainers.training_data.examples import Examples

_SEED = 2026
"""Seed of timesteps and noise; independent of the recipe's, so that losses of different runs can be compared"""
_BATCH = 8
"""Number of pairs in one pass of the denoiser"""


@dataclass(frozen=True)
class HeldOut:
    """The held-out images of a run with their prompts, grouped by size."""

    groups: Sequence[tuple[ValidationSet, Sequence[str], Sequence[SizeConditioning]]]
    """For each image size: its validation set, and a prompt and size conditioning for each of its images"""

    @torch.no_grad()
    def loss(self, predict: Predict, device: torch.device) -> float:
        """Mean squared error over all pairs, weighted by the masks of the images."""
        total, count = 0.0, 0
        for pairs, prompts, frames in self.groups:
            for start in range(0, len(pairs.timesteps), _BATCH):
                rows = slice(start, start + _BATCH)
                images = pairs.images[rows]
                noisy, times = pairs.noisy[rows].to(device), pairs.timesteps[rows].to(device)
                prediction = predict(noisy, times, [prompts[row] for row in images], [frames[row] for row in images])
                error = (prediction.cpu() - pairs.target[rows]).square().mean(1, keepdim=True)
                total += float((error * pairs.weight[rows]).sum())
            count += len(pairs.timesteps)
        return total / count


def held_out(process: ForwardProcess, data: Examples, pairs: int) -> HeldOut:
    """Build the held-out set of `data`, with about `pairs` pairs, evenly spread and at least one for each image."""
    encoded, examples = data.encoded, data.examples
    sizes = sorted({encoded.frames[example.rows[0]].size for example in examples})
    groups = []
    for size in sizes:
        same_size = [example for example in examples if encoded.frames[example.rows[0]].size == size]
        rows = [example.rows[0] for example in same_size]
        latents = torch.stack([encoded.latents[row][0] for row in rows])
        masks = [encoded.masks[row] for row in rows]
        weight = torch.stack([torch.ones(latents.shape[-2:]) if mask is None else mask for mask in masks])
        pairs_per_image = max(1, round(pairs / len(examples)))
        count = pairs_per_image * len(same_size)
        validation_set = validation_set_from_latents(process, latents, weight, count, _SEED)
        prompts = [example.prompt_builder.prompts()[0] for example in same_size]
        frames = [data.frame_of(example, row) for example, row in zip(same_size, rows, strict=True)]
        groups.append((validation_set, prompts, frames))
    return HeldOut(groups)


@dataclass
class BestTracker:
    """The lowest held-out loss so far, its step, and the number of validations since without an improvement."""

    step: int = 0
    loss: float = math.inf
    since: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Record the loss of a validation; return whether it is a new best."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def restore(self, entries: Sequence[Entry]) -> None:
        """Replay the validations that an earlier part of the run has recorded."""
        for entry in entries:
            if "validation" in entry:
                self.update(int(entry["step"]), entry["validation"])


class ValidationHook(Hook):
    """Validates every `settings.every` steps, saves the best adapter, and stops a run that no longer improves."""

    name = "validation"

    def __init__(
        self, settings: Validation, held: HeldOut, predict: Predict, metrics: Metrics, best: PeriodicArtifact
    ) -> None:
        """Store what to validate; `best` writes the adapter whenever the held-out loss is a new minimum."""
        self.every, self._patience = settings.every, settings.patience
        self._held_out, self._predict, self._metrics, self._best_adapter = held, predict, metrics, best
        self._best = BestTracker()

    def begin(self, state: TrainingState) -> None:
        self._best.restore(self._metrics.entries)
        state.has_converged = self._has_converged()

    def is_overdue(self, state: TrainingState) -> bool:
        return self.is_due(state, ()) and "validation" not in self._metrics.entries[-1]

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.step > 0 and (state.is_due(self.every) or state.step == state.steps)

    def run(self, state: TrainingState) -> None:
        """Record the held-out loss, averaged over all processes, and save the adapter if it is a new best."""
        accelerator = state.accelerator
        with state.eval_weights():
            local = torch.tensor(self._held_out.loss(self._predict, accelerator.device), device=accelerator.device)
            loss = float(accelerator.reduce(local.float(), "mean"))
            if self._best.update(state.step, loss):
                self._best_adapter.write(state.step)
        entry = {"step": float(state.step), "validation": loss}
        with defer_sigint():
            self._metrics.add({**entry, "step": state.step})
        self._metrics.announce(entry)
        state.has_converged = self._has_converged()

    def _has_converged(self) -> bool:
        return 0 < self._patience <= self._best.since
