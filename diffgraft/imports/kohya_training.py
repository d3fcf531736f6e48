"""From sd-scripts' arguments to a recipe: optimiser, rates, schedule, loss, noise, sizes, masks."""

from ast import literal_eval
from typing import Any

from diffgraft.imports.account import Account, as_number, as_side, pairs
from diffgraft.imports.kohya_keys import OPTIMIZERS, SCHEDULES
from diffgraft.imports.optimizers import NO_CLIPPING, take_optimizer
from diffgraft.imports.rates import take_rates

_WEIGHED_LIKE_NOISE = 1e9
"""With such a γ, min-SNR weighting of v is SNR / (SNR + 1), which makes its loss that of the noise"""


def take_training(account: Account, kind: str, text_encoder: bool) -> None:
    """Put on the account how training goes.

    Args:
        account: with pictures, method and steps on it.
        kind: network, word or full.
        text_encoder: whether the text encoder may be trained.
    """
    optimizer = _optimizer(account)
    if kind == "network":
        _network_rates(account, text_encoder, optimizer)
    elif kind == "full":
        _full_rates(account, optimizer)
    else:
        account.take("lr", account.number("learning_rate"), "learning_rate")
    _schedule(account, optimizer)
    _loss(account)
    _noise(account)
    _timesteps(account)
    _sizes(account)
    _masks(account)
    seed = account.whole("seed")
    if seed is not None and 0 <= seed < 2**31:
        account.take("seed", seed, "seed")
    elif seed is not None:
        account.lose("seed", "seeds go from 0 to 2147483647 here.")


def _optimizer(account: Account) -> str:
    key, name = "optimizer_type", account.text("optimizer_type")
    for flag, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if account.flag(flag) and not name:
            key, name = flag, meant
    words = account.get("optimizer_args") or []
    said = pairs(words if isinstance(words, list) else str(words).split(), account.name("optimizer_args"))
    settings = {setting: _literal(value) for setting, value in said.items()}
    warmup = settings.pop("warmup_steps", None)
    ours = take_optimizer(account, key, name or "AdamW", OPTIMIZERS, settings, "optimizer_args ")
    if warmup and ours == "schedule-free":
        account.take_part("warmup", warmup, "optimizer_args warmup_steps", warmup)
    norm = account.number("max_grad_norm")
    if norm == 0:
        account.take("max_grad_norm", NO_CLIPPING, "max_grad_norm", remark="gradients are not clipped there")
    else:
        account.take("max_grad_norm", norm, "max_grad_norm")
    return ours


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _network_rates(account: Account, text_encoder: bool, optimizer: str) -> None:
    general, unet = account.number("learning_rate"), account.number("unet_lr")
    said = account.get("text_encoder_lr")
    listed = said if isinstance(said, list) else [said]
    texts = [rate for one in listed if (rate := as_number(account.name("text_encoder_lr"), one)) is not None]
    words_learn = text_encoder and not account.flag("network_train_unet_only")
    flagged = account.flag("network_train_text_encoder_only")
    words_alone = flagged or unet == 0
    if words_alone:
        account.take("lr_scale", {"unet": 0.0}, "network_train_text_encoder_only" if flagged else "unet_lr")
    take_rates(
        account,
        (unet or general, "unet_lr" if unet else "learning_rate"),
        ((texts or [general or 0.0]) if words_learn else [], ["text_encoder_lr" if texts else "learning_rate"]),
        optimizer,
        unet_learns=not words_alone,
    )


def _full_rates(account: Account, optimizer: str) -> None:
    general = account.number("learning_rate")
    keys = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
    said = {key: rate for key in keys if (rate := account.number(key)) is not None}
    stop = account.whole("stop_text_encoder_training")
    trained = account.flag("train_text_encoder") or any(said.values()) or (stop is not None and stop > 0)
    if not trained and stop is None and not said and "train_text_encoder" not in account.given:
        account.ask("text_encoder", "true where the script was train_db.py, which trains it without being told.")
    texts = list(said.values()) or [general or 0.0]
    keys_said = list(said) or ["train_text_encoder" if account.flag("train_text_encoder") else "learning_rate"]
    take_rates(account, (general, "learning_rate"), (texts if trained else [], keys_said), optimizer)
    if trained and stop is not None and stop > 0:
        account.take("text_encoder_stop", stop, "stop_text_encoder_training")


def _schedule(account: Account, optimizer: str) -> None:
    name = account.text("lr_scheduler")
    for key in ("lr_scheduler_type", "lr_scheduler_args", "lr_decay_steps", "lr_scheduler_timescale"):
        if account.has(key):
            account.lose(key, "there are constant, linear, cosine and cosine_with_restarts alone: set lr_schedule.")
    if account.has("lr_scheduler_min_lr_ratio"):
        account.lose("lr_scheduler_min_lr_ratio", "rates fall to 0 here.")
    if optimizer == "schedule-free":
        return  # which goes without schedule or warm-up there, too
    warmup, steps = account.number("lr_warmup_steps"), account.recipe.get("steps")
    if name == "polynomial" and account.number("lr_scheduler_power") == 1:
        account.take("lr_schedule", "linear", "lr_scheduler", remark="to 0, not 1e-7")
    elif name in SCHEDULES:
        account.take("lr_schedule", SCHEDULES[name], "lr_scheduler")
    else:
        account.lose("lr_scheduler", "there is no such schedule here; constant is written in its place.")
    if name == "cosine_with_restarts":
        account.take("lr_cycles", account.whole("lr_scheduler_num_cycles"), "lr_scheduler_num_cycles")
    if warmup and warmup >= 1:
        account.take("warmup", int(warmup), "lr_warmup_steps")
    elif warmup and steps:
        account.take("warmup", int(warmup * steps), "lr_warmup_steps", remark=f"of {steps} steps")
    elif warmup:
        account.lose("lr_warmup_steps", "it is a share of the steps, which are not known: set warmup, in steps.")


def _loss(account: Account) -> None:
    kind, schedule = account.text("loss_type"), account.text("huber_schedule")
    c, scale = account.number("huber_c") or 0.0, account.number("huber_scale") or 1.0
    if kind == "huber" and scale != 1 and schedule == "exponential":
        account.lose("huber_scale", "delta falls from 1 here, and not from another number.")
    if kind == "huber":
        account.take("loss.kind", "huber", "loss_type")
        account.take("loss.schedule", schedule, "huber_schedule")
        remark = f"times huber_scale, {scale:g}" if scale != 1 and schedule == "constant" else ""
        account.take("loss.delta", c * scale if schedule == "constant" else c, "huber_c", remark=remark)
    elif kind == "smooth_l1":
        account.lose(
            "loss_type", "loss.kind=huber is it times delta: with a constant schedule the same but for its size."
        )
    elif kind != "l2":
        account.lose("loss_type", "there are the squared error and huber, which with a small delta comes near.")
    gamma = account.number("min_snr_gamma")
    if gamma:
        account.take("loss.snr_gamma", gamma, "min_snr_gamma")
    if account.flag("scale_v_pred_loss_like_noise_pred") and not gamma:
        remark = "so that each timestep counts SNR / (SNR + 1)"
        account.take("loss.snr_gamma", _WEIGHED_LIKE_NOISE, "scale_v_pred_loss_like_noise_pred", remark=remark)
    elif account.flag("scale_v_pred_loss_like_noise_pred"):
        account.lose("scale_v_pred_loss_like_noise_pred", "here it is not to be had together with min-SNR.")


def _noise(account: Account) -> None:
    for key, ours in (("noise_offset", "noise.offset"), ("ip_noise_gamma", "noise.perturbation")):
        if strength := account.number(key):
            account.take(ours, strength, key)
            if account.flag(f"{key}_random_strength"):
                why = "it is drawn anew for each batch there, up to the whole; here it is always the whole, as written."
                account.lose(f"{key}_random_strength", why)
    levels, discount = account.whole("multires_noise_iterations"), account.number("multires_noise_discount") or 0.0
    if levels and 0 < discount < 1:
        account.take("noise.pyramid", discount, "multires_noise_discount")
        why = "levels grow coarse faster here, ten at most, and the sum is scaled for each picture, not for each batch."
        account.lose("multires_noise_iterations", why)
    elif levels:
        account.lose("multires_noise_discount", "the factor from level to level lies between 0 and 1 here.")


def _timesteps(account: Account) -> None:
    """From `first` up to, not including, `last` there; both included here."""
    first, end = account.whole("min_timestep") or 0, account.whole("max_timestep")
    if first:
        account.take("timesteps.min", first if end is None or first < end else end, "min_timestep")
    if end is not None and end != 1000:
        account.take("timesteps.max", end - 1 if first < end else end, "max_timestep", remark="the last that comes")


def _sizes(account: Account) -> None:
    said = account.get("resolution")
    words = said if isinstance(said, list) else [] if said is None else str(said).split(",")
    sides = [side for word in words if (side := as_side(word)) is not None]
    if sides and len(set(sides)) == 1:
        account.take("resolution", sides[0], "resolution")
    elif words:
        account.lose("resolution", "it is one side here, that of squares and of as many pixels in buckets: set it.")
    if not account.flag("enable_bucket"):
        return
    account.take("buckets.use", True, "enable_bucket")
    step = account.whole("bucket_reso_steps") or 64
    account.take("buckets.step", max(8, step), "bucket_reso_steps", remark="8 at least" if step < 8 else "")
    upscale = not account.flag("bucket_no_upscale")
    account.take("buckets.upscale", upscale, "bucket_no_upscale")
    if upscale:  # which alone these bound, there
        account.take("buckets.min", account.whole("min_bucket_reso"), "min_bucket_reso")
        account.take("buckets.max", account.whole("max_bucket_reso"), "max_bucket_reso")


def _masks(account: Account) -> None:
    for key in ("masked_loss", "alpha_mask"):
        if account.flag(key):
            account.take("masks.use", True, key)
            account.recipe["masks.normalize"] = False  # as there
    if account.text("conditioning_data_dir"):
        why = "masks lie beside their pictures here: copy each there as NAME_mask.png."
        account.lose("conditioning_data_dir", why)
