"""From OneTrainer's configuration to a recipe: optimiser, rates, schedule, loss, timesteps, sizes, masks."""

import math
from typing import Any

from diffgraft.imports.account import Account, as_side
from diffgraft.imports.counting import Epochs
from diffgraft.imports.onetrainer_keys import (
    OPTIMIZER,
    OPTIMIZER_IDLE,
    OPTIMIZER_SETTINGS,
    OPTIMIZERS,
    SCHEDULES,
)
from diffgraft.imports.optimizers import NO_CLIPPING, take_optimizer
from diffgraft.imports.rates import take_rates

_TIMESTEPS = 1000
"""Of the schedules of Stable Diffusion"""


def take_training(account: Account, kind: str, is_xl: bool, epochs: Epochs) -> None:
    """Put on the account how training goes.

    Args:
        account: with pictures, method and steps on it.
        kind: what OneTrainer calls the training method.
        is_xl: whether the base has two text encoders.
        epochs: what turns epochs into steps.
    """
    optimizer = _optimizer(account)
    _rates(account, kind, is_xl, epochs, optimizer)
    _schedule(account, epochs.accumulate, optimizer)
    _loss(account)
    _timesteps(account)
    _sizes(account)
    _masks(account)


def in_steps(account: Account, count_key: str, unit_key: str, epochs: Epochs) -> int | None:
    """A time of theirs in optimiser steps; None where there is none, or it is not known."""
    count, unit = account.number(count_key), account.text(unit_key)
    if not count or unit in ("NEVER", "ALWAYS"):
        return None
    if unit == "STEP":
        return max(1, round(count / epochs.accumulate))
    if unit == "EPOCH" and (steps := epochs.steps(count)):
        return steps
    if unit != "EPOCH" and not {count_key, unit_key} & account.given.keys():
        return None
    what = "the pictures cannot be counted from here" if unit == "EPOCH" else f"there are no {unit.lower()}s here"
    account.lose(count_key, f"it is in steps here, and {what}.")
    return None


def _optimizer(account: Account) -> str:
    said = {
        key.removeprefix("optimizer."): account.given.pop(key)
        for key in [*account.given]
        if key.startswith("optimizer.") and key != OPTIMIZER
    }
    name = account.text(OPTIMIZER)
    peer = OPTIMIZERS.get(name.lower())
    own: dict[str, Any] = {}
    for key, value in said.items():
        account.idle.append(f"optimizer.{key}")
        if peer is not None and key in (*peer.settings, "weight_decay"):
            own[key] = value
        elif key not in OPTIMIZER_IDLE and value not in (None, OPTIMIZER_SETTINGS.get(key)):
            why = (
                "it means nothing to the optimiser here."
                if key in OPTIMIZER_SETTINGS
                else "no setting that is known here."
            )
            account.aside(f"optimizer.{key}", value, why)
    ours = take_optimizer(account, OPTIMIZER, name, OPTIMIZERS, own, "optimizer.")
    norm = account.number("clip_grad_norm") if account.given.get("clip_grad_norm", 1.0) is not None else 0.0
    if norm:
        account.take("max_grad_norm", norm, "clip_grad_norm")
    else:
        account.take_part("max_grad_norm", NO_CLIPPING, "clip_grad_norm", norm, "gradients are not clipped there")
    return ours


_SCALES = {
    "NONE": (False, False),
    "BATCH": (True, False),
    "GLOBAL_BATCH": (True, False),
    "GRADIENT_ACCUMULATION": (False, True),
    "BOTH": (True, True),
    "GLOBAL_BOTH": (True, True),
}
"""Name → whether rates grow with the root of the batch, and of the accumulated batches"""


def _rates(account: Account, kind: str, is_xl: bool, epochs: Epochs, optimizer: str) -> None:
    by_batch, by_accumulation = _SCALES.get(account.text("learning_rate_scaler"), (False, False))
    scale = math.sqrt((epochs.batch if by_batch else 1) * (epochs.accumulate if by_accumulation else 1))
    remark = f"times {scale:g}, of learning_rate_scaler" if scale != 1 else ""
    general = account.number("learning_rate") or 0.0
    if kind == "EMBEDDING":
        key = "embedding_learning_rate" if account.number("embedding_learning_rate") else "learning_rate"
        account.take("lr", (account.number(key) or 0.0) * scale, key, remark=remark)
        return
    key = "unet.learning_rate" if account.number("unet.learning_rate") else "learning_rate"
    rate = account.number(key) or 0.0
    parts = ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)
    trained = [part for part in parts if account.flag(f"{part}.train")]
    said = {part: account.number(f"{part}.learning_rate") for part in trained}
    texts = [(general if said[part] is None else said[part] or 0.0) if part in trained else 0.0 for part in parts]
    keys = [f"{part}.{name}" for part in parts for name in ("learning_rate", "train") if account.has(f"{part}.{name}")]
    take_rates(
        account,
        (rate * scale, key),
        ([text * scale for text in texts], keys or [f"{parts[0]}.train"]),
        optimizer,
        unet_learns=account.flag("unet.train"),
        remark=remark,
    )
    _stop(account, trained, epochs)


def _stop(account: Account, trained: list[str], epochs: Epochs) -> None:
    """When text encoders stop learning."""
    stops = {
        part: in_steps(account, f"{part}.stop_training_after", f"{part}.stop_training_after_unit", epochs)
        for part in trained
    }
    steps = account.recipe.get("steps", 0)
    early = [part for part, stop in stops.items() if stop is not None and stop < steps]
    if early and len({stops[part] if part in early else None for part in trained}) > 1:
        there = " and ".join(f"{part} after {stops[part]} steps" for part in early)
        why = f"{there} stops there, and both text encoders stop at once here: set text_encoder_stop to one step."
        account.lose(f"{early[0]}.stop_training_after", why)
    elif (stop := next(iter(stops.values()), None)) is not None and stop < account.recipe.get("steps", 0):
        account.take("text_encoder_stop", stop, *(f"{part}.stop_training_after" for part in trained))


def _schedule(account: Account, accumulate: int, optimizer: str) -> None:
    name, warmup = account.text("learning_rate_scheduler"), account.number("learning_rate_warmup_steps") or 0.0
    steps = account.recipe.get("steps")
    if name in SCHEDULES and optimizer != "schedule-free":
        account.take("lr_schedule", SCHEDULES[name], "learning_rate_scheduler")
    elif name not in SCHEDULES:
        account.lose("learning_rate_scheduler", "there is no such schedule here; constant is written in its place.")
    cycles = account.number("learning_rate_cycles") or 1.0
    if name == "COSINE_WITH_HARD_RESTARTS" and cycles.is_integer():
        account.take("lr_cycles", int(cycles), "learning_rate_cycles")
    elif name == "COSINE_WITH_HARD_RESTARTS":
        account.lose("learning_rate_cycles", "it is a whole number here: set lr_cycles.")
    if optimizer == "schedule-free":
        accumulate = 1  # it counts by itself there
    if warmup > 1:
        remark = "optimiser steps" if accumulate > 1 else ""
        account.take("warmup", int(warmup / accumulate), "learning_rate_warmup_steps", remark=remark)
    elif warmup > 0 and steps:
        account.take("warmup", int(warmup * steps), "learning_rate_warmup_steps", remark=f"of {steps} steps")
    elif warmup > 0:
        account.lose(
            "learning_rate_warmup_steps", "it is a share of the steps, which are not known: set warmup, in steps."
        )


def _loss(account: Account) -> None:
    for key in ("mae_strength", "log_cosh_strength"):
        if account.has(key):
            account.lose(key, "there are the squared error and huber alone.")
    if account.has("huber_strength"):
        why = (
            "loss.kind=huber is a smooth form of it and twice as large: set it, and loss.delta, of at most 1, by hand."
        )
        account.lose("huber_strength", why)
    if account.has("mse_strength"):
        account.lose("mse_strength", "the squared error counts once here.")
    weight, strength = account.text("loss_weight_fn"), account.number("loss_weight_strength")
    if weight == "MIN_SNR_GAMMA":
        account.take("loss.snr_gamma", strength, "loss_weight_strength")
        account.take("loss.snr_gamma", strength, "loss_weight_fn")
    elif weight == "DEBIASED_ESTIMATION":
        account.take(
            "loss.debiased", True, "loss_weight_fn", remark="of v, it is 1 / √(SNR + 1) there and 1 / (SNR + 1) here"
        )
    elif weight != "CONSTANT":
        account.lose("loss_weight_fn", "timesteps are weighed by loss.snr_gamma or loss.debiased alone here.")


def _timesteps(account: Account) -> None:
    if account.flag("rescale_noise_scheduler_to_zero_terminal_snr"):
        account.take("zero_snr", True, "rescale_noise_scheduler_to_zero_terminal_snr")
        account.take("prediction_type", "v_prediction", "rescale_noise_scheduler_to_zero_terminal_snr")
    elif account.flag("force_v_prediction"):
        account.take("prediction_type", "v_prediction", "force_v_prediction")
    elif account.flag("force_epsilon_prediction"):
        account.take("prediction_type", "epsilon", "force_epsilon_prediction")
    first, end = (account.number(f"{which}_noising_strength") or 0.0 for which in ("min", "max"))
    if first:
        account.take("timesteps.min", int(_TIMESTEPS * first), "min_noising_strength")
    if end != 1:
        account.take("timesteps.max", int(_TIMESTEPS * end) - 1, "max_noising_strength", remark="the last that comes")
    spread = account.text("timestep_distribution")
    if spread == "LOGIT_NORMAL":
        account.take("timesteps.distribution", "logit-normal", "timestep_distribution")
        account.take("timesteps.mean", account.number("noising_bias"), "noising_bias")
        account.take("timesteps.std", (account.number("noising_weight") or 0.0) + 1, "noising_weight")
    elif spread != "UNIFORM":
        account.lose("timestep_distribution", "timesteps come alike, or by timesteps.distribution=logit-normal.")


def _sizes(account: Account) -> None:
    if (side := as_side(account.get("resolution"))) is not None:
        account.take("resolution", side, "resolution")
    else:
        account.lose("resolution", "it is one side here, that of squares and of as many pixels in buckets: set it.")
    if account.flag("aspect_ratio_bucketing"):
        account.take("buckets.use", True, "aspect_ratio_bucketing", remark="shapes differ a little from those there")
    if account.flag("concepts.image.enable_crop_jitter"):
        account.take("crop", "random", "concepts.image.enable_crop_jitter")
        account.take("crops", account.whole("concepts.image_variations"), "concepts.image_variations")
    weights = account.text("unet.weight_dtype")
    if weights in ("INT_8", "NFLOAT_4"):
        account.take("quantize", {"INT_8": "int8", "NFLOAT_4": "nf4"}[weights], "unet.weight_dtype")
    elif weights not in ("NONE", "FLOAT_32", "FLOAT_16", "BFLOAT_16", "TFLOAT_32"):
        account.lose("unet.weight_dtype", "the base is held in `precision`, or by quantize in int8 or nf4.")


def _masks(account: Account) -> None:
    if account.flag("masked_training"):
        account.take("masks.use", True, "masked_training")
        account.take("masks.outside", account.number("unmasked_weight"), "unmasked_weight")
        account.take("masks.normalize", account.flag("normalize_masked_area_loss"), "normalize_masked_area_loss")
