"""Configurations of the kohya_ss GUI, which are JSON, as the arguments of sd-scripts that it makes of them."""

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.account import Account, short
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
"""The GUI's name → the argument's"""
UNSET_AT_ZERO = (
    *("adaptive_noise_scale", "clip_skip", "ip_noise_gamma", "max_timestep", "min_timestep", "max_train_epochs"),
    *("max_train_steps", "min_snr_gamma", "noise_offset", "multires_noise_iterations", "sample_every_n_epochs"),
    *("sample_every_n_steps", "save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps"),
    *("save_last_n_epochs_state", "save_last_n_steps_state", "seed", "unet_lr", "v_pred_like_loss", "vae_batch_size"),
    *("network_dropout", "scale_weight_norms"),
)
"""Where 0 leaves an argument away"""
READ = (
    *("LoRA_type", "LyCORIS_preset", "additional_parameters", "epoch", "lr_warmup", "noise_offset_type", "sdxl"),
    *("sdxl_checkbox", "template", "text_encoder_lr", "unet_lr"),
)
"""Keys that are read here, beside those of `NETWORKS`"""
FAMILIES = ("flux1_checkbox", "sd3_checkbox", "hunyuan_image_checkbox", "anima_checkbox", "lumina_checkbox")
"""Ticked for models of other kinds"""
OTHERS = re.compile(
    r"(flux1?|sd3|hunyuan|anima|lumina|t5xxl|clip_[gl]|single|double|img|txt|ggpo|logit|save_clip|save_t5xxl|ae$|in_dims"
    r"|apply_t5|blocks_to_swap|blockwise|discrete_flow|enable_all_linear|guidance_scale|mem_eff_save|mode_|model_"
    r"prediction|model_type|pos_emb|show_timesteps|split_|timestep_sampling|train_(blocks|lora_ggpo|t5xxl|.*_block_ind)"
    r"|weighting_scheme)"
)
"""Names of settings of models of other kinds"""
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
"""Keys of the window, of files that it writes, and of how it starts processes"""

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
"""What the GUI calls a network → its module, LyCORIS' algorithm, and the keys that go along as arguments"""
_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
ARGUMENTS = {*_PLUS, *(key for _, _, keys in NETWORKS.values() for key in keys)}
"""Keys that are arguments of networks"""
_CALLED = {"constrain": "constraint", "unit": "block_size"}
"""Arguments that the network calls something else"""


def is_gui(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is the GUI's."""
    return bool({"LoRA_type", "max_resolution", "model_list", "lr_warmup"} & config.keys())


def as_arguments(config: Mapping[str, Any]) -> Account:
    """The arguments that the GUI makes of its configuration, on an account.

    Raises:
        DiffgraftError: it is for models that are none of Stable Diffusion 1.x, 2.x and XL.
    """
    for family in FAMILIES:
        if _yes(config.get(family)):
            raise DiffgraftError(
                f"This configuration has {family} ticked: here are Stable Diffusion 1.x, 2.x and XL alone."
            )
    found = Account("kohya_ss", {}, DEFAULTS)
    for key, value in config.items():
        argument = RENAMED.get(key, key)
        if value in ("", None, "False", "None") or (argument in UNSET_AT_ZERO and _number(value) == 0):
            continue
        if argument in DEFAULTS and key not in READ + IDLE:
            found.given[argument] = value
            if argument != key:
                found.names[argument] = key
        elif key not in {*IDLE, *READ, *ARGUMENTS} and not OTHERS.match(key):
            found.given[key] = value  # told of as unknown
    _network(config, found)
    _text_encoders(config, found)
    _duration(config, found)
    if "LoRA_type" in config:  # there either of them is handed on
        unused = "multires_noise_iterations" if config.get("noise_offset_type") == "Original" else "noise_offset"
        found.given.pop(unused, None)
    if "train_dir" in config:
        found.given["enable_bucket"] = True
    template = re.fullmatch(r"(object|style) template", str(config.get("template", "")))
    if template and "token_string" in found.given:
        _set(found, f"use_{template[1]}_template", True, "template", config)
    for key in ("optimizer_args", "lr_scheduler_args"):
        if isinstance(said := found.given.get(key), str):
            found.given[key] = said.replace('"', "").split()
    found.given |= _command_line(str(config.get("additional_parameters") or ""))
    found.idle = [key for key in config if key not in {found.name(argument) for argument in found.given}]
    return found


def _network(config: Mapping[str, Any], found: Account) -> None:
    kind = str(config.get("LoRA_type", ""))
    if "LoRA_type" not in config:
        for key in [*found.given]:
            if key.startswith("network_"):
                del found.given[key]
        return
    if kind not in NETWORKS:
        raise DiffgraftError(
            f"LoRA_type={short(kind)!r} is no network for Stable Diffusion 1.x, 2.x or XL that is known here."
        )
    module, algorithm, keys = NETWORKS[kind]
    words = [f"algo={algorithm}", f"preset={config.get('LyCORIS_preset') or 'full'}"] if algorithm else []
    for key in (*keys, *_PLUS):
        value = config.get(key)
        if value not in (None, "", False) and not (key not in _CONV and _number(value) == 0):
            words.append(f"{_CALLED.get(key, key)}={value}")
    _set(found, "network_module", module, "LoRA_type", config)
    _set(found, "network_args", words, "LoRA_type", config)


def _text_encoders(config: Mapping[str, Any], found: Account) -> None:
    """Which of UNet and text encoder train, and at which rates."""
    if "LoRA_type" in config:
        text, unet = (_number(config.get(key)) or 0.0 for key in ("text_encoder_lr", "unet_lr"))
        for key, value in (("text_encoder_lr", text), ("unet_lr", unet)):
            found.given.pop(key, None)
            if value:
                found.given[key] = value
        if unet and not text:
            _set(found, "network_train_unet_only", True, "text_encoder_lr", config)
        if text and not unet:
            _set(found, "network_train_text_encoder_only", True, "unet_lr", config)
        return
    is_xl = _yes(config.get("sdxl")) or _yes(config.get("sdxl_checkbox"))
    for key in ("learning_rate_te",) if is_xl else ("learning_rate_te1", "learning_rate_te2"):
        found.given.pop(key, None)
    if "learning_rate_te" in config and "train_dir" not in config and not is_xl:
        _set(
            found, "train_text_encoder", bool(_number(config["learning_rate_te"])), "learning_rate_te", config
        )  # train_db.py


def _duration(config: Mapping[str, Any], found: Account) -> None:
    if (epochs := config.get("epoch")) and "max_train_steps" not in found.given and not config.get("dataset_config"):
        _set(found, "gui_epoch", epochs, "epoch", config)
    share, steps = _number(config.get("lr_warmup")) or 0.0, _number(config.get("lr_warmup_steps")) or 0.0
    if steps:
        found.given["lr_warmup_steps"] = int(steps)
    elif share:
        _set(found, "lr_warmup_steps", share / 100, "lr_warmup", config)
    else:
        found.given.pop("lr_warmup_steps", None)
    if config.get("lr_scheduler_num_cycles") == "" and config.get("epoch"):
        _set(found, "lr_scheduler_num_cycles", config["epoch"], "epoch", config)
    if (stop := _number(found.given.pop("stop_text_encoder_training", None))) and "LoRA_type" not in config:
        why = "it is a share of the steps, in percent: set text_encoder_stop, in steps."
        found.aside("stop_text_encoder_training", stop, why)


def _command_line(text: str) -> dict[str, Any]:
    """``--name value …`` as arguments; those without a value are switches."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise DiffgraftError(f"additional_parameters={short(text)!r} cannot be read: {error}.") from error
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
        elif name:
            held = found[name]
            found[name] = word if held is True else [*(held if isinstance(held, list) else [held]), word]
    return found


def _set(found: Account, argument: str, value: Any, key: str, config: Mapping[str, Any]) -> None:
    """Give an argument a value that was made of a key."""
    found.given[argument] = value
    found.names[argument], found.shown[argument] = key, config.get(key)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _yes(value: Any) -> bool:
    return value in (True, 1, "true", "True")
