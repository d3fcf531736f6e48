"""Training states without a run around them, for tests of checkpoints and optimizers."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffgraft.trainers.hooks.checkpoint import restore
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.run.fingerprint import Fingerprint
from diffgraft.trainers.state import TrainingState


def state_of(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
    scaler: Any = None,
) -> TrainingState:
    """A state after `step` steps, of the only process."""
    accelerator = SimpleNamespace(is_main_process=True, scaler=scaler, num_processes=1)
    return TrainingState(1000, parameters, optimizer, ema, accelerator, step=step)


def restored_step(run: Path, fingerprint: Fingerprint, state: TrainingState, *, allow_changes: bool = False) -> int:
    """Restore the newest checkpoint of a run into `state`; its step."""
    restore(run, fingerprint, state, allow_changes=allow_changes)
    return state.step
