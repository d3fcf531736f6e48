"""JSON configurations of the kohya_ss GUI, converted to the arguments of sd-scripts that the GUI would pass."""

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.import_report import ImportReport, short
from diffgraft.imports.kohya_keys import DEFAULTS

RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "image_folder": "train_data_dir",
    "caption_metadata_filename": "in_json",
    "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}
"""Key of the GUI → argument of sd-scripts, where they differ"""
UNSET_AT_ZERO = (
    *("adaptive_noise_scale", "clip_skip", "ip_noise_gamma", "max_timestep", "min_timestep", "max_train_epochs"),
    *("max_train_steps", "min_snr_gamma", "noise_offset", "multires_noise_iterations", "sample_every_n_epochs"),
    *("sample_every_n_steps", "save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps"),
    *("save_last_n_epochs_state", "save_last_n_steps_state", "seed", "unet_lr", "v_pred_like_loss", "vae_batch_size"),
    *("network_dropout", "scale_weight_norms"),
)
"""Arguments that the GUI does not pass if they are 0"""
READ = (
    *("LoRA_type", "LyCORIS_preset", "additional_parameters", "epoch", "lr_warmup", "noise_offset_type", "sdxl"),
    *("sdxl_checkbox", "template", "text_encoder_lr", "unet_lr"),
)
"""Keys that this module reads itself, besides those of `NETWORKS`"""
FAMILIES = ("flux1_checkbox", "sd3_checkbox", "hunyuan_image_checkbox", "anima_checkbox", "lumina_checkbox")
"""Checkboxes for model families that are not supported"""
OTHERS = re.compile(
    r"(flux1?|sd3|hunyuan|anima|lumina|t5xxl|clip_[gl]|single|double|img|txt|ggpo|logit|save_clip|save_t5xxl|ae$|in_dims"
    r"|apply_t5|blocks_to_swap|blockwise|discrete_flow|enable_all_linear|guidance_scale|mem_eff_save|mode_|model_"
    r"prediction|model_type|pos_emb|show_timesteps|split_|timestep_sampling|train_(blocks|lora_ggpo|t5xxl|.*_block_ind)"
    r"|weighting_scheme)"
)
"""Names of settings of model families that are not supported"""
IDLE = (
    *("file_path", "save_as_bool", "model_list", "use_wandb", "lowvram", "batch_size", "full_path", "create_buckets"),
    *("create_caption", "latent_metadata_filename", "use_latent_files", "train_dir"),
    *(
        "generate_caption_database",
        "generate_image_buckets",
        "conv_dims",
        "conv_alphas",
        "stop_text_encoder_training_pct",
    ),
    *("main_process_port", "num_cpu_threads_per_process"),
    *("dynamo_backend", "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args"),
)
"""Keys of the GUI's window, of files that it writes, and of how it launches processes; they do not affect training"""

_DROPOUTS = ("rank_dropout", "module_dropout")
_LYCORIS = ("conv_dim", "conv_alpha", "use_tucker", "use_cp", "rank_dropout_scale", "train_norm", *_DROPOUTS)
_DECOMPOSED = ("bypass_mode", "dora_wd", "use_scalar")
_BLOCKS = (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims", "block_alphas"),
    *("conv_block_dims", "conv_block_alphas"),
)
_CONV = ("conv_dim", "conv_alpha")
NETWORKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Standard": ("networks.lora", "", (*_BLOCKS, *_DROPOUTS)),
    "Kohya LoCon": ("networks.lora", "", (*_CONV, *_BLOCKS, *_DROPOUTS)),
    "Kohya LoHa": ("networks.loha", "", (*_CONV, "use_tucker", *_DROPOUTS)),
    "Kohya LoKr": ("networks.lokr", "", (*_CONV, "use_tucker", "factor", *_DROPOUTS)),
    "Kohya DyLoRA": ("networks.dylora", "", (*_CONV, "unit", *_BLOCKS, *_DROPOUTS)),
    "LoRA-FA": ("networks.lora_fa", "", (*_BLOCKS, *_DROPOUTS)),
    "LoCon": ("lycoris.kohya", "locon", (*_LYCORIS, *_DECOMPOSED)),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon", (*_LYCORIS, *_DECOMPOSED)),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha", (*_LYCORIS, *_DECOMPOSED)),
    "LyCORIS/LoKr": ("lycoris.kohya", "lokr", (*_LYCORIS, *_DECOMPOSED, "factor", "decompose_both")),
    "LyCORIS/iA3": ("lycoris.kohya", "ia3", (*_CONV, "train_on_input")),
    "LyCORIS/GLoRA": ("lycoris.kohya", "glora", _LYCORIS),
    "LyCORIS/DyLoRA": ("lycoris.kohya", "dylora", (*_LYCORIS, "unit")),
    "LyCORIS/BOFT": ("lycoris.kohya", "boft", _LYCORIS),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", "diag-oft", (*_LYCORIS, "constrain", "rescaled")),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", "full", ("rank_dropout_scale", "train_norm", *_DROPOUTS)),
}
"""Network type in the GUI → network module, algorithm of LyCORIS, and the keys that become network arguments"""
_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
ARGUMENTS = {*_PLUS, *(key for _, _, keys in NETWORKS.values() for key in keys)}
"""Keys that become network arguments"""
_ARGUMENT_NAMES = {"constrain": "constraint", "unit": "block_size"}
"""Key of the GUI → network argument, where they differ"""


def is_gui(config: Mapping[str, Any]) -> bool:
    """Whether a configuration was written by the GUI."""
    return bool({"LoRA_type", "max_resolution", "model_list", "lr_warmup"} & config.keys())


def as_arguments(config: Mapping[str, Any]) -> ImportReport:
    """Convert the GUI's configuration to arguments of sd-scripts, in a new report.

    Raises:
        DiffgraftError: it is for a model family other than Stable Diffusion 1.x, 2.x and XL.
    """
    for family in FAMILIES:
        if _yes(config.get(family)):
            raise DiffgraftError(
                f"This configuration has {family}: of the GUI's, only those of Stable Diffusion 1.x, 2.x and XL are "
                "read. For FLUX.1 and Stable Diffusion 3 convert the TOML file that the GUI passes to sd-scripts."
            )
    report = ImportReport("kohya_ss", {}, DEFAULTS)
    for key, value in config.items():
        argument = RENAMED.get(key, key)
        if value in ("", None, "False", "None") or (argument in UNSET_AT_ZERO and _number(value) == 0):
            continue
        if argument in DEFAULTS and key not in READ + IDLE:
            report.values[argument] = value
            if argument != key:
                report.file_keys[argument] = key
        elif key not in {*IDLE, *READ, *ARGUMENTS} and not OTHERS.match(key):
            report.values[key] = value  # reported as unknown
    _network(config, report)
    _text_encoders(config, report)
    _duration(config, report)
    if "LoRA_type" in config:  # the GUI passes only one of them
        unused = "multires_noise_iterations" if config.get("noise_offset_type") == "Original" else "noise_offset"
        report.values.pop(unused, None)
    if "train_dir" in config:
        report.values["enable_bucket"] = True
    template = re.fullmatch(r"(object|style) template", str(config.get("template", "")))
    if template and "token_string" in report.values:
        _set(report, f"use_{template[1]}_template", True, "template", config)
    for key in ("optimizer_args", "lr_scheduler_args"):
        if isinstance(text := report.values.get(key), str):
            report.values[key] = text.replace('"', "").split()
    report.values |= _command_line(str(config.get("additional_parameters") or ""))
    report.unread = [key for key in config if key not in {report.file_key(argument) for argument in report.values}]
    return report


def _network(config: Mapping[str, Any], report: ImportReport) -> None:
    kind = str(config.get("LoRA_type", ""))
    if "LoRA_type" not in config:
        for key in [*report.values]:
            if key.startswith("network_"):
                del report.values[key]
        return
    if kind not in NETWORKS:
        raise DiffgraftError(
            f"LoRA_type={short(kind)!r} is not a known network type for Stable Diffusion 1.x, 2.x or XL."
        )
    module, algorithm, keys = NETWORKS[kind]
    words = [f"algo={algorithm}", f"preset={config.get('LyCORIS_preset') or 'full'}"] if algorithm else []
    for key in (*keys, *_PLUS):
        value = config.get(key)
        if value not in (None, "", False) and not (key not in _CONV and _number(value) == 0):
            words.append(f"{_ARGUMENT_NAMES.get(key, key)}={value}")
    _set(report, "network_module", module, "LoRA_type", config)
    _set(report, "network_args", words, "LoRA_type", config)


def _text_encoders(config: Mapping[str, Any], report: ImportReport) -> None:
    """Set which of UNet and text encoders train, and at which learning rates."""
    if "LoRA_type" in config:
        text, unet = (_number(config.get(key)) or 0.0 for key in ("text_encoder_lr", "unet_lr"))
        for key, value in (("text_encoder_lr", text), ("unet_lr", unet)):
            report.values.pop(key, None)
            if value:
                report.values[key] = value
        if unet and not text:
            _set(report, "network_train_unet_only", True, "text_encoder_lr", config)
        if text and not unet:
            _set(report, "network_train_text_encoder_only", True, "unet_lr", config)
        return
    is_xl = _yes(config.get("sdxl")) or _yes(config.get("sdxl_checkbox"))
    for key in ("learning_rate_te",) if is_xl else ("learning_rate_te1", "learning_rate_te2"):
        report.values.pop(key, None)
    if "learning_rate_te" in config and "train_dir" not in config and not is_xl:
        _set(
            report, "train_text_encoder", bool(_number(config["learning_rate_te"])), "learning_rate_te", config
        )  # train_db.py


def _duration(config: Mapping[str, Any], report: ImportReport) -> None:
    if (epochs := config.get("epoch")) and "max_train_steps" not in report.values and not config.get("dataset_config"):
        _set(report, "gui_epoch", epochs, "epoch", config)
    share, steps = _number(config.get("lr_warmup")) or 0.0, _number(config.get("lr_warmup_steps")) or 0.0
    if steps:
        report.values["lr_warmup_steps"] = int(steps)
    elif share:
        _set(report, "lr_warmup_steps", share / 100, "lr_warmup", config)
    else:
        report.values.pop("lr_warmup_steps", None)
    if config.get("lr_scheduler_num_cycles") == "" and config.get("epoch"):
        _set(report, "lr_scheduler_num_cycles", config["epoch"], "epoch", config)
    if (stop := _number(report.values.pop("stop_text_encoder_training", None))) and "LoRA_type" not in config:
        why = "the GUI counts it in percent of the steps: set text_encoder_stop in steps."
        report.drop_part("stop_text_encoder_training", stop, why)


def _command_line(text: str) -> dict[str, Any]:
    """Parse ``--name value …`` into arguments; those without a value are flags."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise DiffgraftError(f"additional_parameters={short(text)!r} cannot be parsed: {error}.") from error
    arguments: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            arguments[name] = value if equals else True
        elif name:
            old = arguments[name]
            arguments[name] = word if old is True else [*(old if isinstance(old, list) else [old]), word]
    return arguments


def _set(report: ImportReport, argument: str, value: Any, key: str, config: Mapping[str, Any]) -> None:
    """Set an argument to a value that was made from a key of the GUI's configuration."""
    report.values[argument] = value
    report.file_keys[argument], report.file_values[argument] = key, config.get(key)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _yes(value: Any) -> bool:
    return value in (True, 1, "true", "True")
