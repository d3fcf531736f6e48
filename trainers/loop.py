"""The training loop, which runs every objective and every method."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from diffgraft.adapters.method import Attached
from diffgraft.disk import DiskFullError
from diffgraft.errors import DiffgraftError
from diffgraft.progress import StoppedError, phase
from diffgraft.rng import generator
from diffgraft.trainers.hooks.health import divergence_error, first_nonfinite_grad
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics
from diffgraft.trainers.hooks.time_left import TimeLeft
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import Objective
from diffgraft.trainers.optim.optimizers import effective_lr, load_eval_weights, lr_at
from diffgraft.trainers.recipe.groups import OptimSettings
from diffgraft.trainers.runtime.interrupts import defer_sigint
from diffgraft.trainers.runtime.processes import shared_mean, shared_requests
from diffgraft.trainers.state import TrainingState

_PATIENCE = 20
"""Updates in a row that may be skipped in half precision; each halves the loss scale, from 65,536 to 1/16"""
_DROPOUT = 4
"""Random stream that seeds PyTorch's own generators"""


class TrainingLoop:
    """Runs the training steps, and calls the hooks between them."""

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
        """Take the `state` of the newest checkpoint, and `predict`, the denoiser prepared by accelerate."""
        self.optim, self.state, self.predict, self.objective = optim, state, predict, objective
        self.adapter, self.metrics, self.hooks = adapter, metrics, hooks
        self.time_left = TimeLeft(state.steps)
        self.is_updating = False
        """Whether an update is in progress, so that parameters are inconsistent"""
        self.skipped = 0
        """Number of consecutive updates that were skipped because of non-finite gradients"""

    def run(self) -> None:
        """Run the remaining steps; whatever ends them, the last complete step is in a checkpoint.

        Raises:
            DiffgraftError: the loss or a gradient is not finite; the state before that step is kept.
            StoppedError: a stop was requested.
            KeyboardInterrupt: the user interrupted the run.
        """
        state = self.state
        try:
            self.metrics.begin()
            for hook in self.hooks:
                hook.begin(state)
            missed = [hook for hook in self.hooks if hook.is_overdue(state)]
            state.accelerator.wait_for_everyone()  # all processes have looked before the main process writes
            for hook in missed:
                self._run_hook(hook)
            with phase("training", state.steps, state.step) as tracker:
                while not state.is_over:
                    loss = self._step(state.step)
                    self.time_left.end_step()
                    requests = shared_requests(state.accelerator, state.control)
                    for hook in self.hooks:
                        if hook.is_due(state, requests):
                            self._run_hook(hook)
                    if "stop" in requests and not state.is_over:
                        raise StoppedError(f"Stopped on request after step {state.step} of {state.steps}.")
                    tracker.advance(remaining=self.time_left.remaining(state.step), values={"loss": loss})
            load_eval_weights(state.optimizer, state.ema)
            state.accelerator.free_memory()
            for hook in self.hooks:
                hook.end(state)
        except DiskFullError:
            raise  # a checkpoint would not fit either
        except BaseException:
            if not self.is_updating:
                for hook in self.hooks:
                    hook.interrupted(state)
            raise
        finally:
            for hook in self.hooks:
                hook.close()

    def _run_hook(self, hook: Hook) -> None:
        with self.time_left.pause(hook.name, hook.every) if hook.every else nullcontext():
            hook.run(self.state)

    def _step(self, step: int) -> float:
        """Make one update, and return its loss."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = group["rate"] * lr_at(self.optim, step)
        terms = self._accumulate(step)
        norm = state.accelerator.clip_grad_norm_(list(state.parameters.values()), self.optim.max_grad_norm)
        self.skipped = 0 if torch.as_tensor(norm).isfinite() else self.skipped + 1
        # in half precision such updates are skipped, and the loss scale is reduced
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
            effective = {} if (rate := effective_lr(state.optimizer)) is None else {"effective_lr": rate}
            entry = {"step": step + 1, "lr": lr_at(self.optim, step), **effective, **terms}
            self.metrics.add(entry)
            state.step, self.is_updating = step + 1, False
        self.metrics.announce(entry)
        return terms["loss"]

    def _accumulate(self, step: int) -> dict[str, float]:
        """Accumulate the gradients of a step (counted from 0), and return the mean loss and its terms.

        Distributing the samples of a step over micro-batches and processes changes nothing but rounding.
        """
        optim, accelerator = self.optim, self.state.accelerator
        share, device = optim.batch * accelerator.num_processes, accelerator.device
        terms: dict[str, float] = {}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # makes what uses PyTorch's own generators, such as dropout, a function of seed, step and process
            torch.manual_seed(generator(optim.seed, step, accelerator.process_index, _DROPOUT).initial_seed())
            for part in range(optim.accumulate):
                sample_index = (step * optim.accumulate + part) * share + accelerator.process_index * optim.batch
                is_last = part + 1 == optim.accumulate
                with nullcontext() if is_last else accelerator.no_sync(self.predict):
                    losses = self.objective.losses(self.predict, sample_index, optim.batch)
                    accelerator.backward(losses["loss"] / optim.accumulate)
                for name, value in losses.items():
                    terms[name] = terms.get(name, 0.0) + float(value.detach()) / optim.accumulate
        return shared_mean(accelerator, terms)

    def _diverged(self, step: int, loss: float) -> DiffgraftError:
        """Return an error that names the module and the pictures of the first non-finite gradient."""
        self.state.optimizer.zero_grad()
        self._accumulate(step)  # again, as clipping has spread the non-finite values
        count = self.optim.batch * self.optim.accumulate * self.state.accelerator.num_processes
        names = list(dict.fromkeys(self.objective.picture_names(step * count, count)))
        module = first_nonfinite_grad(self.state.parameters, self.adapter.paths())
        return DiffgraftError(divergence_error(self.optim.lr, step, loss, self.skipped, module, names))
