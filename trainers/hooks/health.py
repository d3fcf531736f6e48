"""Checks of gradients during training: non-finite gradients, and modules that never receive one."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.state import TrainingState


class GradMonitor(Hook):
    """Tracks which modules receive gradients; once all have, it costs next to nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], paths: Mapping[str, str]) -> None:
        """`paths` maps the name of each of `parameters` to the path of its module."""
        self._parameters, self._paths = parameters, paths
        self._without_grad = set(parameters)
        """Names of the parameters whose gradients have all been zero or missing so far"""
        self._has_stepped = False

    def after_backward(self) -> None:
        """Check the gradients of a step."""
        self._has_stepped = True
        pending = [(name, self._parameters[name].grad) for name in self._without_grad]
        grads = {name: grad for name, grad in pending if grad is not None}
        if grads:
            nonzero = torch.stack([grad.any() for grad in grads.values()]).tolist()
            self._without_grad -= {name for name, is_nonzero in zip(grads, nonzero, strict=True) if is_nonzero}

    def modules_without_grad(self) -> list[str]:
        """Paths of trainable modules without any non-zero gradient so far, sorted; empty before the first step."""
        if not self._has_stepped:
            return []
        trained = {self._paths[name] for name in self._parameters if name not in self._without_grad}
        untrained = {self._paths[name] for name in self._without_grad if self._parameters[name].requires_grad}
        return sorted(untrained - trained)

    def end(self, state: TrainingState) -> None:
        """Warn of modules that never received a gradient."""
        if state.is_main and (paths := self.modules_without_grad()):
            warnings.warn(
                f"{len(paths)} modules never received a gradient (their output does not affect the loss): "
                f"{', '.join(paths)}.",
                stacklevel=3,
            )


def first_nonfinite_grad(parameters: Mapping[str, nn.Parameter], paths: Mapping[str, str]) -> str:
    """Path of the first module with an infinite or NaN gradient; empty if all gradients are finite."""
    return next((paths[name] for name, value in parameters.items() if not _is_finite(value.grad)), "")


def divergence_error(lr: float, step: int, loss: float, skipped: int, module: str, names: Sequence[str]) -> str:
    """Message for a run whose loss or gradients became infinite or NaN.

    Args:
        lr: the recipe's learning rate.
        step: the step, counted from 0.
        loss: its loss.
        skipped: number of consecutive updates that were skipped for non-finite gradients.
        module: path of the first module with a non-finite gradient, or empty.
        names: the images of the step.
    """
    where = f"the first non-finite gradient is that of {module}" if module else "all gradients are finite"
    updates = f", after {skipped} skipped updates in a row" if skipped > 1 else ""
    return (
        f"Training diverged at step {step + 1}{updates}: the loss is {loss:.4g}, and {where}. The images of this step "
        f"are {', '.join(names[:8])}{' …' if len(names) > 8 else ''}. The newest checkpoint is from the step before. "
        f"Use a smaller lr (now {lr}), or precision=bfloat16 or float32 if it is float16."
    )


def _is_finite(grad: Tensor | None) -> bool:
    return grad is None or bool(grad.isfinite().all())
