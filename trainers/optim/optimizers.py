"""Optimizers, each from its own library, and learning-rate schedules."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from diffgraft.errors import DiffgraftError
from diffgraft.third_party import import_bitsandbytes
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.recipe.groups import OptimSettings
from diffgraft.trainers.runtime.interrupts import defer_sigint

Groups = list[dict[str, Any]]
_HIGH_LR = 0.1
"""Learning rate from which training diverges with all optimizers except Prodigy"""
_MAX_PRODIGY_LR = 2.0
"""Above this Prodigy's lr, a factor on the learning rate it finds, is too large; its authors recommend 1"""
_MIN_PRODIGY_LR = 0.1
"""Below this Prodigy's lr is probably a learning rate meant for another optimizer"""


def _adamw(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    on_gpu = all(value.is_cuda for group in groups for value in group["params"])
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=on_gpu or None)


def _bitsandbytes(name: str) -> Callable[[Groups, OptimSettings], torch.optim.Optimizer]:
    def make(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
        optimizer_class = getattr(import_bitsandbytes().optim, name)
        optimizer: torch.optim.Optimizer = optimizer_class(groups, lr=optim.lr, weight_decay=optim.weight_decay)
        return optimizer

    return make


def _adafactor(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    fixed_lr = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer: torch.optim.Optimizer = Adafactor(groups, lr=optim.lr, weight_decay=optim.weight_decay, **fixed_lr)
    return optimizer


def _prodigy(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    options = {"use_bias_correction": True, "safeguard_warmup": True}  # its authors' values for diffusion models
    optimizer: torch.optim.Optimizer = Prodigy(groups, lr=optim.lr, weight_decay=optim.weight_decay, **options)
    return optimizer


def _schedule_free(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer: torch.optim.Optimizer = AdamWScheduleFree(groups, lr=optim.lr, weight_decay=optim.weight_decay)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


_FACTORIES: dict[str, Callable[[Groups, OptimSettings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "lion": _bitsandbytes("Lion32bit"),
    "lion8bit": _bitsandbytes("Lion8bit"),
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "schedule-free": _schedule_free,
}


def new_optimizer(
    optim: OptimSettings, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Create the recipe's optimizer, with one parameter group for each learning-rate scale, stored as its `rate`.

    Args:
        optim: the recipe's optimizer settings.
        parameters: trainable parameters by name.
        scales: learning-rate scales by parameter name; 1 where missing.

    Raises:
        DiffgraftError: the optimizer does not support the scales or the schedule.
    """
    check_optimizer(optim, [scales.get(name, 1.0) for name in parameters])
    groups = [
        {"params": [value for name, value in parameters.items() if scales.get(name, 1.0) == scale], "rate": scale}
        for scale in sorted({scales.get(name, 1.0) for name in parameters})
    ]
    optimizer = _FACTORIES[optim.optimizer](groups, optim)
    if warning := lr_warning(optim):
        warnings.warn(warning, stacklevel=2)
    return optimizer


def check_optimizer(optim: OptimSettings, scales: Sequence[float]) -> None:
    """Check that the optimizer supports the other settings; `scales` are the learning-rate scales of all parameters.

    Raises:
        DiffgraftError: it does not support one of them.
    """
    if optim.optimizer == "prodigy":
        if len(set(scales)) > 1:
            raise DiffgraftError(
                "optimizer=prodigy finds one learning rate for all parameters, but some have a scale of their own: "
                "leave lr_scale, "
                "options.loraplus_ratio and options.token_lr_scale at 1 (or lr_scale at 0, to freeze), or use adamw."
            )
        if optim.text_encoder_stop is not None:
            raise DiffgraftError(
                "optimizer=prodigy finds its learning rate from all parameters, so it would jump when the text "
                f"encoders stop: remove text_encoder_stop={optim.text_encoder_stop}, or use optimizer=adamw."
            )
    if optim.optimizer == "schedule-free":
        if optim.lr_schedule != "constant":
            raise DiffgraftError(
                f"optimizer=schedule-free cannot use lr_schedule={optim.lr_schedule}: set lr_schedule=constant."
            )
        if optim.ema:
            raise DiffgraftError(
                f"optimizer=schedule-free averages the weights itself, so ema={optim.ema} cannot be used: remove ema."
            )


def lr_warning(optim: OptimSettings) -> str:
    """Warning about a learning rate that does not suit the optimizer; empty if it does."""
    if optim.optimizer != "prodigy" and optim.lr >= _HIGH_LR:
        return (
            f"lr={optim.lr} is far too large for optimizer={optim.optimizer}: each step changes weights by about that "
            "much, and training diverges. Usual values are at most 0.01; lr=1 is for prodigy."
        )
    if optim.optimizer == "prodigy" and optim.lr > _MAX_PRODIGY_LR:
        return (
            f"optimizer=prodigy multiplies the learning rate that it finds by lr={optim.lr}, which is too large: "
            "set lr=1."
        )
    if optim.optimizer != "prodigy" or optim.lr >= _MIN_PRODIGY_LR:
        return ""
    return (
        f"optimizer=prodigy multiplies the learning rate that it finds by lr={optim.lr}, so it hardly learns: set lr=1."
    )


def load_eval_weights(optimizer: Any, ema: Ema | None = None) -> None:
    """Set the parameters to the values used for saving and generating: the EMA's, or schedule-free's average.

    Schedule-free computes gradients at other values than it evaluates and saves.
    """
    if ema is not None:
        ema.copy_to()
    elif _has_modes(optimizer):
        optimizer.eval()


@contextmanager
def eval_weights(optimizer: Any, ema: Ema | None = None) -> Iterator[None]:
    """Within the block parameters have the values used for saving and generating; afterwards exactly the old ones.

    Ctrl-C may interrupt the block, but not the swapping of values before and after it.
    """
    with defer_sigint() as interruptible, _swapped(optimizer, ema), interruptible():
        yield


@contextmanager
def _swapped(optimizer: Any, ema: Ema | None) -> Iterator[None]:
    if ema is not None:
        with ema.swapped_in():
            yield
        return
    if not _has_modes(optimizer):
        yield
        return
    before = [(value, value.detach().clone()) for group in optimizer.param_groups for value in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for value, old in before:
                value.copy_(old)


def effective_lr(optimizer: Any) -> float | None:
    """Learning rate of the last step of an optimizer that adapts it itself (Prodigy: d · lr); None for others."""
    group = optimizer.param_groups[0]
    return float(group["d"]) * float(group["lr"]) if "d" in group else None


def _has_modes(optimizer: Any) -> bool:
    """Whether the optimizer has separate train and eval values, as schedule-free does."""
    return "train_mode" in optimizer.param_groups[0]


def lr_at(optim: OptimSettings, step: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then one of diffusers' schedules."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    factor = _schedule(optim.lr_schedule, max(1, optim.steps - optim.warmup), optim.lr_cycles)
    return optim.lr * factor(step - optim.warmup)


@cache
def _schedule(name: str, steps: int, cycles: int) -> Callable[[int], float]:
    """Function from a step to its factor on the learning rate, taken from diffusers' scheduler of that name."""
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, dummy, num_warmup_steps=0, num_training_steps=steps, num_cycles=cycles)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
