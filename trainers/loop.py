"""The one training loop: every objective and every method goes through it."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffgraft.adapters.method import Attached
from diffgraft.errors import DiffgraftError
from diffgraft.generation.plots import save_loss_plot
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.hooks.checkpoint import adopt, restore, save_checkpoint, with_changes
from diffgraft.trainers.hooks.ema import Average
from diffgraft.trainers.hooks.eta import Pace, PacedBar
from diffgraft.trainers.hooks.health import Health, broken, diverged
from diffgraft.trainers.hooks.metrics import Entry, Record, curves
from diffgraft.trainers.hooks.throttle import Sparing
from diffgraft.trainers.hooks.trackers import end_trackers, start_trackers, track, track_picture
from diffgraft.trainers.hooks.validation import Trial
from diffgraft.trainers.objectives.objective import Objective
from diffgraft.trainers.optim.gradients import accumulate, shown_in
from diffgraft.trainers.optim.lr_scales import factors, stop_text
from diffgraft.trainers.optim.optimizers import at_rest, found_rate, new_optimizer, rate, settle
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import Identity
from diffgraft.trainers.runtime.interrupts import undisturbed
from diffgraft.trainers.runtime.processes import check_together

_PATIENCE = 20
"""Updates in a row that half precision may leave out: each halves the scale of the loss, from 65,536 to 1/16"""


@dataclass(frozen=True)
class OnTheWay:
    """Files that are made every so many steps, while the parameters have the values that count: samples, adapters.

    All processes make them together, as a UNet in shards needs, and one writes.
    """

    every: int
    """0: never"""
    folder: Path
    suffix: str
    make: Callable[[int, Path], None]
    """Step and file → the file"""

    def file(self, step: int) -> Path:
        """That of a step."""
        return self.folder / f"step-{step:06d}{self.suffix}"


class Loop:
    """Trains what is attached for the recipe's steps, going on from the newest checkpoint in the run's folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        identity: Identity,
        accelerator: Any,
        denoiser: Denoiser,
        adapter: Attached,
        objective: Objective,
        on_the_way: Sequence[OnTheWay],
        trial: Trial | None = None,
        *,
        changed: bool = False,
    ) -> None:
        """Put everything back as the newest checkpoint has it.

        Raises:
            DiffgraftError: it belongs to another `identity`, and that was not `changed` on purpose; or processes would
                go on from different steps.
        """
        self.recipe, self.folder = recipe, folder
        self.accelerator, self.denoiser, self.adapter = accelerator, denoiser, adapter
        self.objective, self.on_the_way, self.trial = objective, on_the_way, trial
        self.lead = bool(accelerator.is_main_process)
        self.paths = adapter.paths()
        self.parameters = {name: value for name, value in adapter.trainable().items() if value.requires_grad}
        optimizer = new_optimizer(recipe, self.parameters, factors(recipe, adapter))
        self.average = Average(self.parameters, recipe.ema) if recipe.ema else None
        scaler = accelerator.scaler
        self.done = restore(folder, identity, self.parameters, optimizer, self.average, scaler, changed=changed)
        self.saved, self.identity = self.done, with_changes(folder, identity)
        check_together(accelerator, folder, self.done)
        self.record = Record(folder, self.done, writes=self.lead)
        if trial is not None:
            trial.go_on(self.record.entries)
        self.health = Health(self.parameters, self.paths)
        self.pace = Pace(recipe.steps)
        self.plot = Sparing(lambda: save_loss_plot(curves(self.record.entries), folder / "loss.png"))
        self.text_stops = None if recipe.text_encoder_stop is None else max(recipe.text_encoder_stop, self.done)
        self.is_stepping = False
        """Whether some weights have moved in this step and others have not yet"""
        self.lost = 0
        """Updates in a row that could not be made"""
        self.predict, self.optimizer = accelerator.prepare(denoiser, optimizer)

    def run(self) -> list[Entry]:
        """Take the steps that are left.

        Returns:
            What was recorded of all steps, as it stands in ``metrics.jsonl``.

        Raises:
            DiffgraftError: the loss or a gradient is no number any more; the state before that is kept.
            KeyboardInterrupt: passed on, after a checkpoint was written (unless it came in the middle of an update).
        """
        if self.lead:
            adopt(self.folder, self.identity)
            self.record.begin()
            start_trackers(self.accelerator, self.recipe, self.done)
        try:
            self._catch_up()
            self._take_steps()
        except KeyboardInterrupt:
            if not self.is_stepping:
                self._save_what_is_new()
            if self.lead and self.record.entries:
                save_loss_plot(curves(self.record.entries), self.folder / "loss.png")
            raise
        finally:
            end_trackers(self.accelerator)
        settle(self.optimizer, self.average)
        self.accelerator.free_memory()
        if self.lead and (still := self.health.still()):
            warnings.warn(
                f"{len(still)} of the modules never moved, as what they compute never reached the loss: "
                f"{', '.join(still)}.",
                stacklevel=3,
            )
        return self.record.entries

    def _catch_up(self) -> None:
        """Do what comes after the step that was last saved, if a run was stopped in between."""
        if self._is_trial_due() and "validation" not in self.record.entries[-1]:
            self._validate()
        missing = [one for one in self.on_the_way if _due(one.every, self.done) and not one.file(self.done).exists()]
        self.accelerator.wait_for_everyone()  # all have looked before one of them writes
        for one in missing:
            self._make(one)

    def _take_steps(self) -> None:
        first, end = self.done, self.recipe.steps
        bar = PacedBar(range(first, end), "training", initial=first, total=end, leave=False, disable=not self.lead)
        bar.pace = self.pace
        with bar:
            for step in bar:
                if self._is_over():
                    break
                loss = self._step(step)
                self.pace.stepped()
                if self._is_trial_due():
                    self._validate()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                self._keep()

    def _step(self, step: int) -> float:
        """One update, and its loss."""
        if step == self.text_stops:
            with undisturbed():
                stop_text(self.adapter, self.optimizer, self.average)
                self.denoiser.freeze_text()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate(self.recipe, step)
        terms = accumulate(self.recipe, self.accelerator, self.predict, self.objective, step)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.recipe.max_grad_norm)
        self.lost = 0 if torch.as_tensor(norm).isfinite() else self.lost + 1
        # in half precision such updates are left out, and smaller numbers tried
        lost_too_many = self.lost == (1 if self.accelerator.scaler is None else _PATIENCE)
        if lost_too_many or not math.isfinite(terms["loss"]):
            raise self._diverged(step, terms["loss"])
        self.health.note()
        with undisturbed():
            self.is_stepping = True
            self.optimizer.step()
            self.adapter.after_step()
            if self.average is not None:
                self.average.step()
            self.optimizer.zero_grad()
            found = {} if (own := found_rate(self.optimizer)) is None else {"effective_lr": own}
            self._note({"step": step + 1, "lr": rate(self.recipe, step), **found, **terms})
            self.done, self.is_stepping = step + 1, False
        return terms["loss"]

    def _diverged(self, step: int, loss: float) -> DiffgraftError:
        """Keep what was good, and find where numbers became none."""
        self.optimizer.zero_grad()
        accumulate(self.recipe, self.accelerator, self.predict, self.objective, step)  # clipping has spread it
        self._save_what_is_new()
        names = shown_in(self.recipe, self.accelerator, self.objective, step)
        where = broken(self.parameters, self.paths)
        return DiffgraftError(diverged(self.recipe, step, loss, self.lost, where, names))

    def _validate(self) -> None:
        """Record the held-out loss, the same number on all processes; a new best is kept."""
        trial, accelerator = self.trial, self.accelerator
        assert trial is not None
        with self.pace.pause("validation", trial.settings.every), at_rest(self.optimizer, self.average):
            own = torch.tensor(trial.loss(self.predict, accelerator.device), device=accelerator.device)
            loss = float(accelerator.reduce(own.float(), "mean"))
            if trial.best.take(self.done, loss):
                trial.keep()
        with undisturbed():
            self._note({"step": self.done, "validation": loss})

    def _keep(self) -> None:
        """A checkpoint, samples, adapters and the plot, those that are due."""
        if self.lead and (self._is_over() or _due(self.recipe.checkpoint_every, self.done)):
            self._save()
        for one in self.on_the_way:
            if _due(one.every, self.done):
                self._make(one)
        if self.lead:
            self.plot()

    def _save(self) -> None:
        with undisturbed(), self.pace.pause("checkpoint", self.recipe.checkpoint_every or self.recipe.steps):
            self.record.to_disk()
            state = (self.parameters, self.optimizer, self.average, self.accelerator.scaler)
            is_due = self._is_over() or _due(self.recipe.checkpoint_every, self.done)
            save_checkpoint(self.folder, self.done, self.identity, *state, is_due=is_due)
            self.saved = self.done

    def _save_what_is_new(self) -> None:
        if self.lead and self.done > self.saved:
            self._save()

    def _make(self, due: OnTheWay) -> None:
        file = due.file(self.done)
        with self.pace.pause(due.folder.name, due.every), at_rest(self.optimizer, self.average):
            due.make(self.done, file)
        if self.lead and due.suffix == ".png" and file.exists():
            track_picture(self.accelerator, due.folder.name, file, self.done)

    def _note(self, entry: Entry) -> None:
        self.record.add(entry)
        if self.lead:
            track(self.accelerator, entry)

    def _is_trial_due(self) -> bool:
        return self.trial is not None and self.done > 0 and self.trial.is_due(self.done, self.recipe.steps)

    def _is_over(self) -> bool:
        return self.done == self.recipe.steps or (self.trial is not None and self.trial.is_over())


def _due(every: int, done: int) -> bool:
    """Whether what comes every so many steps, where 0 is never, comes after this one."""
    return every > 0 and done > 0 and done % every == 0
