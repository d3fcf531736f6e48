"""State of a training run: parameters, optimizer, EMA, and the number of steps taken."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffgraft.progress import Control
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.optim.optimizers import eval_weights


@dataclass
class TrainingState:
    """Mutable state of a run, which the training loop updates and passes to its hooks."""

    steps: int
    """Number of steps of the whole run"""
    parameters: Mapping[str, nn.Parameter]
    """Trainable parameters by name"""
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    accelerator: Any
    control: Control = field(default_factory=Control)
    """Requests of other threads to stop, sample or save"""
    step: int = 0
    """Number of steps taken, including those before a resume"""
    has_converged: bool = False
    """Whether a hook ends the run before its last step"""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which alone writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def scaler(self) -> Any:
        """Gradient scaler of float16 training; None in other precisions."""
        return self.accelerator.scaler

    @property
    def is_over(self) -> bool:
        """Whether the run has taken its last step."""
        return self.step >= self.steps or self.has_converged

    def is_due(self, every: int) -> bool:
        """Whether something periodic is due after this step; with `every` 0 it never is."""
        return every > 0 and self.step > 0 and self.step % every == 0

    def eval_weights(self) -> AbstractContextManager[None]:
        """Within the block the parameters have the values used for saving and generating, such as those of the EMA."""
        return eval_weights(self.optimizer, self.ema)
