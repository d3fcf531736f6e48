"""What a run has at a step: parameters, optimizer, average, and how far it has come."""

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
    """A run at a step, as its loop changes it and its hooks see it."""

    steps: int
    """To take in all"""
    parameters: Mapping[str, nn.Parameter]
    """What trains, by name"""
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    accelerator: Any
    control: Control = field(default_factory=Control)
    """What another thread asks of the run"""
    step: int = 0
    """Steps that were taken, those before a resume included"""
    has_converged: bool = False
    """Whether a hook has ended the run before its last step"""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def scaler(self) -> Any:
        """What scales losses in half precision; None elsewhere."""
        return self.accelerator.scaler

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take."""
        return self.step >= self.steps or self.has_converged

    def is_due(self, every: int) -> bool:
        """Whether something that comes every so many steps, where 0 is never, comes after this one."""
        return every > 0 and self.step > 0 and self.step % every == 0

    def eval_weights(self) -> AbstractContextManager[None]:
        """Within the block the parameters have the values that are saved and drawn with."""
        return eval_weights(self.optimizer, self.ema)
