"""The one training loop: every objective and every method goes through it."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from diffgraft.adapters.method import Attached
from diffgraft.disk import DiskFullError
from diffgraft.errors import DiffgraftError
from diffgraft.progress import StoppedError, phase
from diffgraft.rng import generator
from diffgraft.trainers.hooks.eta import Eta
from diffgraft.trainers.hooks.health import diverged, first_nonfinite_grad
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import Objective
from diffgraft.trainers.optim.optimizers import effective_lr, load_eval_weights, lr_at
from diffgraft.trainers.recipe.groups import OptimSettings
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.runtime.processes import shared_mean, shared_requests
from diffgraft.trainers.state import TrainingState

_PATIENCE = 20
"""Updates in a row that half precision may leave out: each halves the scale of the loss, from 65,536 to 1/16"""
_DROPOUT = 4
"""Stream of random numbers for what is left to PyTorch's own generators"""


class Loop:
    """Takes the steps of a run, and calls its hooks between them."""

    def __init__(
        self,
        optim: OptimSettings,
        state: TrainingState,
        predict: Predict,
        objective: Objective,
        adapter: Attached,
        metrics: Metrics,
        hooks: Sequence[Hook],
    ) -> None:
        """`state` is that of the newest checkpoint; `predict` is the denoiser as accelerate has prepared it."""
        self.optim, self.state, self.predict, self.objective = optim, state, predict, objective
        self.adapter, self.metrics, self.hooks = adapter, metrics, hooks
        self.eta = Eta(state.steps)
        self.is_updating = False
        """Whether some weights have moved in this step and others have not yet"""
        self.skipped = 0
        """Updates in a row that could not be made"""

    def run(self) -> None:
        """Take the steps that are left; whatever ends it, what was trained is in a checkpoint.

        Raises:
            DiffgraftError: the loss or a gradient is no number any more; the state before that is kept.
            StoppedError: it was asked to stop.
            KeyboardInterrupt: passed on.
        """
        state = self.state
        try:
            self.metrics.begin()
            for hook in self.hooks:
                hook.begin(state)
            missed = [hook for hook in self.hooks if hook.is_missed(state)]
            state.accelerator.wait_for_everyone()  # all have looked before one of them writes
            for hook in missed:
                self._run_hook(hook)
            with phase("training", state.steps, state.step) as tracker:
                while not state.is_over:
                    loss = self._step(state.step)
                    self.eta.update()
                    asked = shared_requests(state.accelerator, state.control)
                    for hook in self.hooks:
                        if hook.is_due(state, asked):
                            self._run_hook(hook)
                    if "stop" in asked and not state.is_over:
                        raise StoppedError(f"Stopped after step {state.step} of {state.steps}, as was asked for.")
                    tracker.advance(remaining=self.eta.remaining(state.step), values={"loss": loss})
            load_eval_weights(state.optimizer, state.ema)
            state.accelerator.free_memory()
            for hook in self.hooks:
                hook.end(state)
        except DiskFullError:
            raise  # there is no room for a checkpoint either
        except BaseException:
            if not self.is_updating:
                for hook in self.hooks:
                    hook.interrupted(state)
            raise
        finally:
            for hook in self.hooks:
                hook.close()

    def _run_hook(self, hook: Hook) -> None:
        with self.eta.pause(hook.name, hook.every) if hook.every else nullcontext():
            hook.run(self.state)

    def _step(self, step: int) -> float:
        """One update, and its loss."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = group["rate"] * lr_at(self.optim, step)
        terms = self._accumulate(step)
        norm = state.accelerator.clip_grad_norm_(list(state.parameters.values()), self.optim.max_grad_norm)
        self.skipped = 0 if torch.as_tensor(norm).isfinite() else self.skipped + 1
        # in half precision such updates are left out, and smaller numbers tried
        has_diverged = self.skipped == (1 if state.scaler is None else _PATIENCE)
        if has_diverged or not math.isfinite(terms["loss"]):
            raise self._diverged(step, terms["loss"])
        for hook in self.hooks:
            hook.after_backward()
        with defer_sigint():
            self.is_updating = True
            state.optimizer.step()
            self.adapter.after_step()
            if state.ema is not None:
                state.ema.step()
            state.optimizer.zero_grad()
            found = {} if (own := effective_lr(state.optimizer)) is None else {"effective_lr": own}
            entry = {"step": step + 1, "lr": lr_at(self.optim, step), **found, **terms}
            self.metrics.add(entry)
            state.step, self.is_updating = step + 1, False
        self.metrics.announce(entry)
        return terms["loss"]

    def _accumulate(self, step: int) -> dict[str, float]:
        """Add up the gradients of a step (counted from 0), and return the means of the loss and its terms.

        How the samples of a step are dealt out to batches and processes changes no more than rounding.
        """
        optim, accelerator = self.optim, self.state.accelerator
        share, device = optim.batch * accelerator.num_processes, accelerator.device
        terms: dict[str, float] = {}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # what is left to PyTorch's own generators, such as dropout, is a function of seed, step and process, too
            torch.manual_seed(generator(optim.seed, step, accelerator.process_index, _DROPOUT).initial_seed())
            for part in range(optim.accumulate):
                place = (step * optim.accumulate + part) * share + accelerator.process_index * optim.batch
                last = part + 1 == optim.accumulate
                with nullcontext() if last else accelerator.no_sync(self.predict):
                    losses = self.objective.losses(self.predict, place, optim.batch)
                    accelerator.backward(losses["loss"] / optim.accumulate)
                for name, value in losses.items():
                    terms[name] = terms.get(name, 0.0) + float(value.detach()) / optim.accumulate
        return shared_mean(accelerator, terms)

    def _diverged(self, step: int, loss: float) -> DiffgraftError:
        """Find where numbers became none; the state before that is what `run` keeps."""
        self.state.optimizer.zero_grad()
        self._accumulate(step)  # clipping has spread it
        count = self.optim.batch * self.optim.accumulate * self.state.accelerator.num_processes
        names = list(dict.fromkeys(self.objective.names(step * count, count)))
        module = first_nonfinite_grad(self.state.parameters, self.adapter.paths())
        return DiffgraftError(diverged(self.optim.lr, step, loss, self.skipped, module, names))
