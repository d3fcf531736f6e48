"""Conversion of sd-scripts' arguments to a recipe: optimizer, learning rates, schedule, loss, noise, sizes, masks."""

from ast import literal_eval
from typing import Any

from diffgraft.imports.import_report import ImportReport, as_number, as_side, parse_pairs
from diffgraft.imports.kohya_keys import OPTIMIZERS, SCHEDULES
from diffgraft.imports.optimizers import NO_CLIPPING, map_optimizer
from diffgraft.imports.rates import map_rates

_NOISE_LIKE_GAMMA = 1e9
"""With this γ the min-SNR weight of v-prediction is SNR / (SNR + 1), which makes its loss equal to that of ε"""


def map_training(report: ImportReport, kind: str, text_encoder: bool) -> None:
    """Map all settings of the training itself.

    Args:
        report: a report with images, method and steps.
        kind: network, word or full.
        text_encoder: whether the method may train the text encoder.
    """
    optimizer = _optimizer(report)
    if kind == "network":
        _network_rates(report, text_encoder, optimizer)
    elif kind == "full":
        _full_rates(report, optimizer)
    else:
        report.map("lr", report.number("learning_rate"), "learning_rate")
    _schedule(report, optimizer)
    _loss(report)
    _noise(report)
    _timesteps(report)
    _sizes(report)
    _masks(report)
    seed = report.integer("seed")
    if seed is not None and 0 <= seed < 2**31:
        report.map("seed", seed, "seed")
    elif seed is not None:
        report.drop("seed", "must be between 0 and 2147483647.")


def _optimizer(report: ImportReport) -> str:
    key, name = "optimizer_type", report.text("optimizer_type")
    for flag, optimizer in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if report.flag(flag) and not name:
            key, name = flag, optimizer
    words = report.get("optimizer_args") or []
    arguments = parse_pairs(words if isinstance(words, list) else str(words).split(), report.file_key("optimizer_args"))
    settings = {setting: _literal(value) for setting, value in arguments.items()}
    warmup = settings.pop("warmup_steps", None)
    optimizer = map_optimizer(report, key, name or "AdamW", OPTIMIZERS, settings, "optimizer_args ")
    if warmup and optimizer == "schedule-free":
        report.map_part("warmup", warmup, "optimizer_args warmup_steps", warmup)
    norm = report.number("max_grad_norm")
    if norm == 0:
        report.map("max_grad_norm", NO_CLIPPING, "max_grad_norm", remark="0 turns clipping off in sd-scripts")
    else:
        report.map("max_grad_norm", norm, "max_grad_norm")
    return optimizer


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _network_rates(report: ImportReport, text_encoder: bool, optimizer: str) -> None:
    general, unet = report.number("learning_rate"), report.number("unet_lr")
    text_lr = report.get("text_encoder_lr")
    listed = text_lr if isinstance(text_lr, list) else [text_lr]
    name = report.file_key("text_encoder_lr")
    texts = [rate for value in listed if (rate := as_number(name, value)) is not None]
    words_learn = text_encoder and not report.flag("network_train_unet_only")
    flagged = report.flag("network_train_text_encoder_only")
    words_alone = flagged or unet == 0
    if words_alone:
        report.map("lr_scale", {"unet": 0.0}, "network_train_text_encoder_only" if flagged else "unet_lr")
    map_rates(
        report,
        (unet or general, "unet_lr" if unet else "learning_rate"),
        ((texts or [general or 0.0]) if words_learn else [], ["text_encoder_lr" if texts else "learning_rate"]),
        optimizer,
        unet_learns=not words_alone,
    )


def _full_rates(report: ImportReport, optimizer: str) -> None:
    general = report.number("learning_rate")
    keys = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
    rates = {key: rate for key in keys if (rate := report.number(key)) is not None}
    stop = report.integer("stop_text_encoder_training")
    trained = report.flag("train_text_encoder") or any(rates.values()) or (stop is not None and stop > 0)
    if not trained and stop is None and not rates and "train_text_encoder" not in report.values:
        report.todo("text_encoder", "true if the script was train_db.py, which trains it by default.")
    texts = list(rates.values()) or [general or 0.0]
    rate_keys = list(rates) or ["train_text_encoder" if report.flag("train_text_encoder") else "learning_rate"]
    map_rates(report, (general, "learning_rate"), (texts if trained else [], rate_keys), optimizer)
    if trained and stop is not None and stop > 0:
        report.map("text_encoder_stop", stop, "stop_text_encoder_training")


def _schedule(report: ImportReport, optimizer: str) -> None:
    name = report.text("lr_scheduler")
    for key in ("lr_scheduler_type", "lr_scheduler_args", "lr_decay_steps", "lr_scheduler_timescale"):
        if report.is_set(key):
            report.drop(key, "only constant, linear, cosine and cosine_with_restarts are supported: set lr_schedule.")
    if report.is_set("lr_scheduler_min_lr_ratio"):
        report.drop("lr_scheduler_min_lr_ratio", "learning rates always decay to 0.")
    if optimizer == "schedule-free":
        return  # it has no schedule and no warm-up in sd-scripts either
    warmup, steps = report.number("lr_warmup_steps"), report.recipe.get("steps")
    if name == "polynomial" and report.number("lr_scheduler_power") == 1:
        report.map("lr_schedule", "linear", "lr_scheduler", remark="decays to 0, not 1e-7")
    elif name in SCHEDULES:
        report.map("lr_schedule", SCHEDULES[name], "lr_scheduler")
    else:
        report.drop("lr_scheduler", "this schedule is not supported; replaced by constant.")
    if name == "cosine_with_restarts":
        report.map("lr_cycles", report.integer("lr_scheduler_num_cycles"), "lr_scheduler_num_cycles")
    if warmup and warmup >= 1:
        report.map("warmup", int(warmup), "lr_warmup_steps")
    elif warmup and steps:
        report.map("warmup", int(warmup * steps), "lr_warmup_steps", remark=f"of {steps} steps")
    elif warmup:
        report.drop("lr_warmup_steps", "it is a share of the steps, which are unknown: set warmup in steps.")


def _loss(report: ImportReport) -> None:
    kind, schedule = report.text("loss_type"), report.text("huber_schedule")
    c, scale = report.number("huber_c") or 0.0, report.number("huber_scale") or 1.0
    if kind == "huber" and scale != 1 and schedule == "exponential":
        report.drop("huber_scale", "delta always decays from 1.")
    if kind == "huber":
        report.map("loss.kind", "huber", "loss_type")
        report.map("loss.schedule", schedule, "huber_schedule")
        remark = f"times huber_scale, {scale:g}" if scale != 1 and schedule == "constant" else ""
        report.map("loss.delta", c * scale if schedule == "constant" else c, "huber_c", remark=remark)
    elif kind == "smooth_l1":
        report.drop("loss_type", "use loss.kind=huber; with a constant schedule it equals smooth_l1 times delta.")
    elif kind != "l2":
        report.drop("loss_type", "only l2 and huber are supported; loss.kind=huber with a small delta comes close.")
    gamma = report.number("min_snr_gamma")
    if gamma:
        report.map("loss.snr_gamma", gamma, "min_snr_gamma")
    if report.flag("scale_v_pred_loss_like_noise_pred") and not gamma:
        remark = "so that each timestep counts SNR / (SNR + 1)"
        report.map("loss.snr_gamma", _NOISE_LIKE_GAMMA, "scale_v_pred_loss_like_noise_pred", remark=remark)
    elif report.flag("scale_v_pred_loss_like_noise_pred"):
        report.drop("scale_v_pred_loss_like_noise_pred", "cannot be combined with min-SNR.")


def _noise(report: ImportReport) -> None:
    for key, ours in (("noise_offset", "noise.offset"), ("ip_noise_gamma", "noise.perturbation")):
        if strength := report.number(key):
            report.map(ours, strength, key)
            if report.flag(f"{key}_random_strength"):
                why = "the strength is not random, but always the given one."
                report.drop(f"{key}_random_strength", why)
    levels, discount = report.integer("multires_noise_iterations"), report.number("multires_noise_discount") or 0.0
    if levels and 0 < discount < 1:
        report.map("noise.pyramid", discount, "multires_noise_discount")
        why = "levels get coarser faster, and are at most ten; noise is normalized for each image, not each batch."
        report.drop("multires_noise_iterations", why)
    elif levels:
        report.drop("multires_noise_discount", "the factor between levels must be between 0 and 1.")


def _timesteps(report: ImportReport) -> None:
    """Map the range of timesteps; max_timestep is exclusive, timesteps.max inclusive."""
    first, end = report.integer("min_timestep") or 0, report.integer("max_timestep")
    if first:
        report.map("timesteps.min", first if end is None or first < end else end, "min_timestep")
    if end is not None and end != 1000:
        report.map("timesteps.max", end - 1 if first < end else end, "max_timestep", remark="inclusive")


def _sizes(report: ImportReport) -> None:
    size = report.get("resolution")
    words = size if isinstance(size, list) else [] if size is None else str(size).split(",")
    sides = [side for word in words if (side := as_side(word)) is not None]
    if sides and len(set(sides)) == 1:
        report.map("resolution", sides[0], "resolution")
    elif words:
        report.drop(
            "resolution",
            "a recipe has one side, that of squares; buckets have the same number of pixels: set resolution.",
        )
    if not report.flag("enable_bucket"):
        return
    report.map("buckets.use", True, "enable_bucket")
    step = report.integer("bucket_reso_steps") or 64
    report.map("buckets.step", max(8, step), "bucket_reso_steps", remark="at least 8" if step < 8 else "")
    upscale = not report.flag("bucket_no_upscale")
    report.map("buckets.upscale", upscale, "bucket_no_upscale")
    if upscale:  # sd-scripts applies these limits only then
        report.map("buckets.min", report.integer("min_bucket_reso"), "min_bucket_reso")
        report.map("buckets.max", report.integer("max_bucket_reso"), "max_bucket_reso")


def _masks(report: ImportReport) -> None:
    for key in ("masked_loss", "alpha_mask"):
        if report.flag(key):
            report.map("masks.use", True, key)
            report.recipe["masks.normalize"] = False  # as in sd-scripts
    if report.text("conditioning_data_dir"):
        why = "masks are read from beside their images: copy each there as NAME_mask.png."
        report.drop("conditioning_data_dir", why)
