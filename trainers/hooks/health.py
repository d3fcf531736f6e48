"""What is watched while training: gradients that are no numbers any more, and modules that never get one."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.state import TrainingState


class GradMonitor(Hook):
    """Watches the parameters of a run; in a healthy one it costs next to nothing after the first steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], paths: Mapping[str, str]) -> None:
        """`paths`: path of the module that each of `parameters` belongs to, by the parameter's name."""
        self._parameters, self._paths = parameters, paths
        self._still = set(parameters)
        """Names of those that have had no gradient but zero so far"""
        self._looked = False

    def after_backward(self) -> None:
        """Look at the gradients of a step."""
        self._looked = True
        waiting = [(name, self._parameters[name].grad) for name in self._still]
        there = {name: grad for name, grad in waiting if grad is not None}
        if there:
            moved = torch.stack([grad.any() for grad in there.values()]).tolist()
            self._still -= {name for name, any_of_it in zip(there, moved, strict=True) if any_of_it}

    def modules_without_grad(self) -> list[str]:
        """Modules that train to the end, and of which no parameter ever had a gradient; empty before the first step."""
        if not self._looked:
            return []
        moved = {self._paths[name] for name in self._parameters if name not in self._still}
        return sorted({self._paths[name] for name in self._still if self._parameters[name].requires_grad} - moved)

    def end(self, state: TrainingState) -> None:
        """Warn of modules that never had a gradient."""
        if state.is_main and (still := self.modules_without_grad()):
            warnings.warn(
                f"{len(still)} modules never received a gradient (their output does not affect the loss): "
                f"{', '.join(still)}.",
                stacklevel=3,
            )


def first_nonfinite_grad(parameters: Mapping[str, nn.Parameter], paths: Mapping[str, str]) -> str:
    """The first module with a gradient that is no number; empty where there is none."""
    return next((paths[name] for name, value in parameters.items() if not _is_finite(value.grad)), "")


def diverged(lr: float, step: int, loss: float, skipped: int, module: str, names: Sequence[str]) -> str:
    """The message for numbers that are none any more, after `skipped` updates in a row that could not be made."""
    where = f"the first gradient that is no number is that of {module}" if module else "all gradients are numbers"
    tried = f", where {skipped} updates in a row could not be made" if skipped > 1 else ""
    return (
        f"Training has diverged at step {step + 1}{tried}: the loss is {loss:.4g}, and {where}. Its pictures were: "
        f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}. The newest checkpoint is of the step before. Lower "
        f"lr (now {lr}), or use precision=bfloat16 or float32 if it was float16."
    )


def _is_finite(grad: Tensor | None) -> bool:
    return grad is None or bool(grad.isfinite().all())
