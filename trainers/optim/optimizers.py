"""Optimisers, each from its own library, and how the learning rate goes."""

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
"""From here on a rate breaks what is learnt, with all optimizers but Prodigy"""
_HIGHEST_FACTOR = 2.0
"""Of the rate that Prodigy finds; its authors leave it at 1"""
_FACTOR = 0.1
"""A factor on the rate that Prodigy finds is hardly meant to be less, and another optimiser's rate not so much"""


def _adamw(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    on_gpu = all(value.is_cuda for group in groups for value in group["params"])
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=on_gpu or None)


def _bitsandbytes(name: str) -> Callable[[Groups, OptimSettings], torch.optim.Optimizer]:
    def make(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
        kind = getattr(import_bitsandbytes().optim, name)
        optimizer: torch.optim.Optimizer = kind(groups, lr=optim.lr, weight_decay=optim.weight_decay)
        return optimizer

    return make


def _adafactor(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # the rate is the recipe's
    optimizer: torch.optim.Optimizer = Adafactor(groups, lr=optim.lr, weight_decay=optim.weight_decay, **fixed)
    return optimizer


def _prodigy(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    more = {"use_bias_correction": True, "safeguard_warmup": True}  # as its authors have it for diffusion models
    optimizer: torch.optim.Optimizer = Prodigy(groups, lr=optim.lr, weight_decay=optim.weight_decay, **more)
    return optimizer


def _schedule_free(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer: torch.optim.Optimizer = AdamWScheduleFree(groups, lr=optim.lr, weight_decay=optim.weight_decay)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


_MAKERS: dict[str, Callable[[Groups, OptimSettings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "lion": _bitsandbytes("Lion32bit"),
    "lion8bit": _bitsandbytes("Lion8bit"),
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "schedule-free": _schedule_free,
}


def new_optimizer(
    optim: OptimSettings, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The optimiser a recipe names; each group of parameters has its factor on the learning rate, `rate`.

    Raises:
        DiffgraftError: it cannot go with the method or the schedule.
    """
    check_optimizer(optim, [rates.get(name, 1.0) for name in parameters])
    kinds = sorted({rates.get(name, 1.0) for name in parameters})
    groups = [
        {"params": [value for name, value in parameters.items() if rates.get(name, 1.0) == kind], "rate": kind}
        for kind in kinds
    ]
    optimizer = _MAKERS[optim.optimizer](groups, optim)
    if said := lr_warning(optim):
        warnings.warn(said, stacklevel=2)
    return optimizer


def check_optimizer(optim: OptimSettings, rates: Sequence[float]) -> None:
    """Refuse settings that an optimiser cannot follow; `rates` are the factors on the rate of all that trains.

    Raises:
        DiffgraftError: there is such a setting.
    """
    if optim.optimizer == "prodigy":
        if len(set(rates)) > 1:
            raise DiffgraftError(
                "optimizer=prodigy finds one rate for all, and here some parameters train at another: leave rates, "
                "options.loraplus_ratio and options.token_lr_scale at 1 (or a rate at 0), or use optimizer=adamw."
            )
        if optim.text_encoder_stop is not None:
            raise DiffgraftError(
                "optimizer=prodigy finds its rate from all that trains, and it would leap where text encoders stop: "
                f"leave text_encoder_stop={optim.text_encoder_stop} out, or use optimizer=adamw."
            )
    if optim.optimizer == "schedule-free":
        if optim.lr_schedule != "constant":
            raise DiffgraftError(
                f"optimizer=schedule-free needs no schedule, and lr_schedule={optim.lr_schedule}: leave it at constant."
            )
        if optim.ema:
            raise DiffgraftError(
                f"optimizer=schedule-free averages by itself, and ema={optim.ema}: leave one of them out."
            )


def lr_warning(optim: OptimSettings) -> str:
    """What a person is told of a rate that hardly suits the optimiser; empty where it is as one would have it."""
    if optim.optimizer != "prodigy" and optim.lr >= _HIGH_LR:
        return (
            f"lr={optim.lr} is far more than optimizer={optim.optimizer} takes: each step changes weights by about "
            "as much, and what is learnt breaks. Rates are 0.01 and less; lr=1 is for prodigy."
        )
    if optim.optimizer == "prodigy" and optim.lr > _HIGHEST_FACTOR:
        return (
            f"optimizer=prodigy finds the rate itself and multiplies it by lr={optim.lr}, which is too much: set lr=1."
        )
    if optim.optimizer != "prodigy" or optim.lr >= _FACTOR:
        return ""
    return f"optimizer=prodigy finds the rate itself and multiplies it by lr={optim.lr}, so it hardly learns: set lr=1."


def load_eval_weights(optimizer: Any, ema: Ema | None = None) -> None:
    """Give parameters the values that count: those of the average, where one is kept.

    Schedule-free trains at other values, too, between those that count and where it has got to.
    """
    if ema is not None:
        ema.copy_to()
    elif _has_modes(optimizer):
        optimizer.eval()


@contextmanager
def eval_weights(optimizer: Any, ema: Ema | None = None) -> Iterator[None]:
    """Within the block parameters have the values that count; afterwards the very bits from before.

    Ctrl-C may end the block, but comes between neither.
    """
    with defer_sigint() as opened, _swapped(optimizer, ema), opened():
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
            for value, kept in before:
                value.copy_(kept)


def effective_lr(optimizer: Any) -> float | None:
    """The rate at which the last step was made, where the optimiser finds a factor on it by itself: Prodigy's d."""
    group = optimizer.param_groups[0]
    return float(group["d"]) * float(group["lr"]) if "d" in group else None


def _has_modes(optimizer: Any) -> bool:
    return "train_mode" in optimizer.param_groups[0]


def lr_at(optim: OptimSettings, step: int) -> float:
    """Learning rate of a step (counted from 0): a linear warm-up, then one of diffusers' schedules."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    shape = _shape(optim.lr_schedule, max(1, optim.steps - optim.warmup), optim.lr_cycles)
    return optim.lr * shape(step - optim.warmup)


@cache
def _shape(name: str, steps: int, cycles: int) -> Callable[[int], float]:
    """Factor on the rate of each step; diffusers has it inside a scheduler, which wants an optimiser."""
    from diffusers.optimization import get_scheduler

    idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, idle, num_warmup_steps=0, num_training_steps=steps, num_cycles=cycles)
    found: Callable[[int], float] = scheduler.lr_lambdas[0]
    return found
