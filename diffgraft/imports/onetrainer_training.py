"""Conversion of OneTrainer's configuration to a recipe: optimizer, rates, schedule, loss, timesteps, sizes, masks."""

import math
from collections.abc import Sequence
from typing import Any

from diffgraft.imports.counting import Epochs
from diffgraft.imports.import_report import ImportReport, as_side
from diffgraft.imports.onetrainer_keys import (
    OPTIMIZER,
    OPTIMIZER_IDLE,
    OPTIMIZER_SETTINGS,
    OPTIMIZERS,
    SCHEDULES,
)
from diffgraft.imports.optimizers import NO_CLIPPING, map_optimizer
from diffgraft.imports.rates import map_rates

_TIMESTEPS = 1000
"""Number of timesteps of Stable Diffusion's noise schedules"""


def map_training(report: ImportReport, kind: str, encoders: Sequence[str], epochs: Epochs) -> None:
    """Map all settings of the training itself.

    Args:
        report: import report in which images, method and steps are mapped already.
        kind: OneTrainer's training method.
        encoders: names of the base's text encoders.
        epochs: converter from epochs to steps.
    """
    optimizer = _optimizer(report)
    _rates(report, kind, encoders, epochs, optimizer)
    _schedule(report, epochs.accumulate, optimizer)
    _loss(report)
    _timesteps(report)
    _sizes(report)
    _masks(report)


def in_steps(report: ImportReport, count_key: str, unit_key: str, epochs: Epochs) -> int | None:
    """An interval of OneTrainer in optimizer steps; None if there is none, or it cannot be converted."""
    count, unit = report.number(count_key), report.text(unit_key)
    if not count or unit in ("NEVER", "ALWAYS"):
        return None
    if unit == "STEP":
        return max(1, round(count / epochs.accumulate))
    if unit == "EPOCH" and (steps := epochs.steps(count)):
        return steps
    if unit != "EPOCH" and not {count_key, unit_key} & report.values.keys():
        return None
    why = "the images cannot be counted" if unit == "EPOCH" else f"{unit.lower()}s are not supported"
    report.drop(count_key, f"a recipe counts optimizer steps, and {why}.")
    return None


def _optimizer(report: ImportReport) -> str:
    settings = {
        key.removeprefix("optimizer."): report.values.pop(key)
        for key in [*report.values]
        if key.startswith("optimizer.") and key != OPTIMIZER
    }
    name = report.text(OPTIMIZER)
    rule = OPTIMIZERS.get(name.lower())
    mapped: dict[str, Any] = {}
    for key, value in settings.items():
        report.unread.append(f"optimizer.{key}")
        if rule is not None and key in (*rule.settings, "weight_decay"):
            mapped[key] = value
        elif key not in OPTIMIZER_IDLE and value not in (None, OPTIMIZER_SETTINGS.get(key)):
            why = "the recipe's optimizer has no such setting." if key in OPTIMIZER_SETTINGS else "not a known setting."
            report.drop_part(f"optimizer.{key}", value, why)
    optimizer = map_optimizer(report, OPTIMIZER, name, OPTIMIZERS, mapped, "optimizer.")
    norm = report.number("clip_grad_norm") if report.values.get("clip_grad_norm", 1.0) is not None else 0.0
    if norm:
        report.map("max_grad_norm", norm, "clip_grad_norm")
    else:
        report.map_part("max_grad_norm", NO_CLIPPING, "clip_grad_norm", norm, "clipping is off in OneTrainer")
    return optimizer


_SCALES = {
    "NONE": (False, False),
    "BATCH": (True, False),
    "GLOBAL_BATCH": (True, False),
    "GRADIENT_ACCUMULATION": (False, True),
    "BOTH": (True, True),
    "GLOBAL_BOTH": (True, True),
}
"""Name of a scaler → whether learning rates grow with the root of the batch size, and of the accumulation"""


def _rates(report: ImportReport, kind: str, parts: Sequence[str], epochs: Epochs, optimizer: str) -> None:
    by_batch, by_accumulation = _SCALES.get(report.text("learning_rate_scaler"), (False, False))
    scale = math.sqrt((epochs.batch if by_batch else 1) * (epochs.accumulate if by_accumulation else 1))
    remark = f"times {scale:g} by learning_rate_scaler" if scale != 1 else ""
    general = report.number("learning_rate") or 0.0
    if kind == "EMBEDDING":
        key = "embedding_learning_rate" if report.number("embedding_learning_rate") else "learning_rate"
        report.map("lr", (report.number(key) or 0.0) * scale, key, remark=remark)
        return
    key = "unet.learning_rate" if report.number("unet.learning_rate") else "learning_rate"
    rate = report.number(key) or 0.0
    trained = [part for part in parts if report.flag(f"{part}.train")]
    rates = {part: report.number(f"{part}.learning_rate") for part in trained}
    texts = [(general if rates[part] is None else rates[part] or 0.0) if part in trained else 0.0 for part in parts]
    keys = [
        f"{part}.{name}" for part in parts for name in ("learning_rate", "train") if report.is_set(f"{part}.{name}")
    ]
    map_rates(
        report,
        (rate * scale, key),
        ([text * scale for text in texts], keys or [f"{parts[0]}.train"]),
        optimizer,
        unet_learns=report.flag("unet.train"),
        remark=remark,
    )
    _stop(report, trained, epochs)


def _stop(report: ImportReport, trained: list[str], epochs: Epochs) -> None:
    """Map the step at which the text encoders stop training."""
    stops = {
        part: in_steps(report, f"{part}.stop_training_after", f"{part}.stop_training_after_unit", epochs)
        for part in trained
    }
    steps = report.recipe.get("steps", 0)
    early = [part for part, stop in stops.items() if stop is not None and stop < steps]
    if early and len({stops[part] if part in early else None for part in trained}) > 1:
        stopped = " and ".join(f"{part} after {stops[part]} steps" for part in early)
        why = f"only {stopped} stops, but text_encoder_stop stops both text encoders at once: set it by hand."
        report.drop(f"{early[0]}.stop_training_after", why)
    elif (stop := next(iter(stops.values()), None)) is not None and stop < report.recipe.get("steps", 0):
        report.map("text_encoder_stop", stop, *(f"{part}.stop_training_after" for part in trained))


def _schedule(report: ImportReport, accumulate: int, optimizer: str) -> None:
    name, warmup = report.text("learning_rate_scheduler"), report.number("learning_rate_warmup_steps") or 0.0
    steps = report.recipe.get("steps")
    if name in SCHEDULES and optimizer != "schedule-free":
        report.map("lr_schedule", SCHEDULES[name], "learning_rate_scheduler")
    elif name not in SCHEDULES:
        report.drop("learning_rate_scheduler", "this schedule is not supported; replaced by constant.")
    cycles = report.number("learning_rate_cycles") or 1.0
    if name == "COSINE_WITH_HARD_RESTARTS" and cycles.is_integer():
        report.map("lr_cycles", int(cycles), "learning_rate_cycles")
    elif name == "COSINE_WITH_HARD_RESTARTS":
        report.drop("learning_rate_cycles", "lr_cycles must be an integer: set it by hand.")
    if optimizer == "schedule-free":
        accumulate = 1  # its warm-up counts optimizer steps in OneTrainer
    if warmup > 1:
        remark = "optimizer steps" if accumulate > 1 else ""
        report.map("warmup", int(warmup / accumulate), "learning_rate_warmup_steps", remark=remark)
    elif warmup > 0 and steps:
        report.map("warmup", int(warmup * steps), "learning_rate_warmup_steps", remark=f"of {steps} steps")
    elif warmup > 0:
        report.drop("learning_rate_warmup_steps", "it is a share of the steps, which are unknown: set warmup in steps.")


def _loss(report: ImportReport) -> None:
    for key in ("mae_strength", "log_cosh_strength"):
        if report.is_set(key):
            report.drop(key, "only the squared error and huber are supported.")
    if report.is_set("huber_strength"):
        why = (
            "use loss.kind=huber, a smooth form of it and twice as large, and loss.delta, at most 1: set them by hand."
        )
        report.drop("huber_strength", why)
    if report.is_set("mse_strength"):
        report.drop("mse_strength", "the weight of the squared error is always 1.")
    weight, strength = report.text("loss_weight_fn"), report.number("loss_weight_strength")
    if weight == "MIN_SNR_GAMMA":
        report.map("loss.snr_gamma", strength, "loss_weight_strength")
        report.map("loss.snr_gamma", strength, "loss_weight_fn")
    elif weight == "DEBIASED_ESTIMATION":
        report.map(
            "loss.debiased",
            True,
            "loss_weight_fn",
            remark="for v it is 1 / √(SNR + 1) in OneTrainer, and 1 / (SNR + 1) here",
        )
    elif weight != "CONSTANT":
        report.drop("loss_weight_fn", "timesteps are weighted only by loss.snr_gamma or loss.debiased.")


def _timesteps(report: ImportReport) -> None:
    if report.flag("rescale_noise_scheduler_to_zero_terminal_snr"):
        report.map("zero_snr", True, "rescale_noise_scheduler_to_zero_terminal_snr")
        report.map("prediction_type", "v_prediction", "rescale_noise_scheduler_to_zero_terminal_snr")
    elif report.flag("force_v_prediction"):
        report.map("prediction_type", "v_prediction", "force_v_prediction")
    elif report.flag("force_epsilon_prediction"):
        report.map("prediction_type", "epsilon", "force_epsilon_prediction")
    first, end = (report.number(f"{which}_noising_strength") or 0.0 for which in ("min", "max"))
    if first:
        report.map("timesteps.min", int(_TIMESTEPS * first), "min_noising_strength")
    if end != 1:
        report.map("timesteps.max", int(_TIMESTEPS * end) - 1, "max_noising_strength", remark="inclusive")
    if (shift := report.number("timestep_shift")) != 1.0:
        report.map("timesteps.shift", shift, "timestep_shift")
    distribution = report.text("timestep_distribution")
    if distribution == "LOGIT_NORMAL":
        report.map("timesteps.distribution", "logit-normal", "timestep_distribution")
        report.map("timesteps.mean", report.number("noising_bias"), "noising_bias")
        report.map("timesteps.std", (report.number("noising_weight") or 0.0) + 1, "noising_weight")
    elif distribution != "UNIFORM":
        report.drop("timestep_distribution", "timesteps are uniform, or drawn by timesteps.distribution=logit-normal.")


def _sizes(report: ImportReport) -> None:
    if (side := as_side(report.get("resolution"))) is not None:
        report.map("resolution", side, "resolution")
    else:
        report.drop(
            "resolution",
            "a recipe has one side, that of squares; buckets have the same number of pixels: set resolution.",
        )
    if report.flag("aspect_ratio_bucketing"):
        report.map("buckets.use", True, "aspect_ratio_bucketing", remark="shapes differ slightly from OneTrainer's")
    if report.flag("concepts.image.enable_crop_jitter"):
        report.map("crop", "random", "concepts.image.enable_crop_jitter")
        report.map("crops", report.integer("concepts.image_variations"), "concepts.image_variations")
    weights = report.text("unet.weight_dtype")
    if weights in ("INT_8", "NFLOAT_4"):
        report.map("quantize", {"INT_8": "int8", "NFLOAT_4": "nf4"}[weights], "unet.weight_dtype")
    elif weights not in ("NONE", "FLOAT_32", "FLOAT_16", "BFLOAT_16", "TFLOAT_32"):
        report.drop("unet.weight_dtype", "the base is kept in `precision`, or quantized by quantize=int8 or nf4.")


def _masks(report: ImportReport) -> None:
    if report.flag("masked_training"):
        report.map("masks.use", True, "masked_training")
        report.map("masks.outside", report.number("unmasked_weight"), "unmasked_weight")
        report.map("masks.normalize", report.flag("normalize_masked_area_loss"), "normalize_masked_area_loss")
