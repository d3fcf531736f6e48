"""kohya's sd-scripts: what its arguments are called here, their defaults, and what has no counterpart.

Names and defaults as in sd-scripts of February 2026: `train_network.py`, `train_db.py`, `fine_tune.py`,
`train_textual_inversion.py`, their `sdxl_` forms, and what they take from `library/`.
"""

from typing import Any

from diffgraft.imports.account import Key, nothing, only
from diffgraft.imports.kohya_network import NETWORK
from diffgraft.imports.optimizers import (
    ADAFACTOR,
    ADAMW,
    ADAMW_8BIT,
    LION,
    LION_8BIT,
    PRODIGY,
    SCHEDULE_FREE,
    Peer,
    paged,
)

PLAIN = {
    "pretrained_model_name_or_path": Key(None, "base"),
    "gradient_accumulation_steps": Key(1, kind=int),
    "gradient_checkpointing": Key(False, "gradient_checkpointing", kind=bool),
    "mixed_precision": Key("no", "precision", {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}),
    "torch_compile": Key(False, "compile", kind=bool),
    "flip_aug": Key(False, "flip", kind=bool),
    "random_crop": Key(
        False, "crop", {True: "random", False: "center"}, bool, "`crops` places of each picture take turns"
    ),
    "shuffle_caption": Key(False, "tags.shuffle", kind=bool),
    "caption_separator": Key(",", "tags.separator"),
    "caption_tag_dropout_rate": Key(0.0, "tags.drop", kind=float),
    "caption_dropout_rate": Key(0.0, "caption_dropout", kind=float),
    "debiased_estimation_loss": Key(False, "loss.debiased", kind=bool),
    "v_parameterization": Key(False, "prediction_type", {True: "v_prediction", False: None}, bool),
    "zero_terminal_snr": Key(False, "zero_snr", {True: True, False: None}, bool),
    "max_token_length": Key(
        None,
        "long_prompts",
        {None: None, 75: None, 150: "chunk", 225: "chunk"},
        int,
        "of any length, where there it ends",
    ),
    "enable_wildcard": Key(
        False, "captions.lines", {True: "random", False: None}, bool, "of {a|b} in a caption nothing is chosen here"
    ),
    "validation_split": Key(0.0, "validation.share", kind=float),
    "validate_every_n_steps": Key(None, "validation.every", kind=int),
}
"""Keys that are one of ours"""

_PER_PICTURE = "there is no such change of pictures here."
_WORDS = "captions are changed by tags.… alone here; change the .txt files instead."
NOTHING = {
    **nothing("the base's own VAE is used: put another into the base's folder.", vae=None),
    **nothing("captions have no weights in brackets here.", weighted_captions=False),
    **nothing("the offset is the same for all pictures here.", adaptive_noise_scale=None),
    **nothing("there is no such term of the loss here.", v_pred_like_loss=None),
    **nothing(_PER_PICTURE, color_aug=False, face_crop_aug_range=None),
    **nothing("pictures are scaled with Lanczos' filter here.", resize_interpolation=None),
    **nothing(_WORDS, secondary_separator=None, token_warmup_min=1, token_warmup_step=0),
    **nothing("captions are left out by caption_dropout alone, at random.", caption_dropout_every_n_epochs=0),
    **nothing("an adapter counts the same in all data sets here.", network_multiplier=1.0),
    **nothing("prior.by=prediction preserves what the base says.", custom_attributes=None),
    **nothing(
        "what trains is kept in float32 here; the base and the arithmetic are in `precision`.",
        full_fp16=False,
        full_bf16=False,
    ),
    **nothing("quantize=int8 or nf4 makes the base smaller here.", fp8_base=False, fp8_base_unet=False),
    **nothing("activations are not moved to the processor here.", cpu_offload_checkpointing=False),
    **nothing(
        "the optimiser steps after the backward pass here.", fused_backward_pass=False, fused_optimizer_groups=None
    ),
    **nothing("blocks go by their names here: lr_scale.IN04=0.5.", block_lr=None),
    **nothing(
        "DeepSpeed is set up with `accelerate config` here.",
        deepspeed=False,
        zero_stage=2,
        offload_optimizer_device=None,
        offload_optimizer_nvme_path=None,
        offload_param_device=None,
        offload_param_nvme_path=None,
        zero3_init_flag=False,
        zero3_save_16bit_model=False,
        fp16_master_weights_and_gradients=False,
    ),
    **nothing(
        "processes are set up with `accelerate config` here.",
        ddp_timeout=None,
        ddp_gradient_as_bucket_view=False,
        ddp_static_graph=False,
        dynamo_backend="inductor",
        num_processes=1,
        num_machines=1,
        multi_gpu=False,
        gpu_ids=None,
    ),
    **nothing(
        "a run is taken up with: diffgraft train --resume FOLDER; other tools' states cannot be.",
        resume=None,
        initial_epoch=None,
        initial_step=None,
        skip_until_initial_step=False,
    ),
    **nothing("pictures are held out by the hash of their content here.", validation_seed=None),
    **nothing(
        "all that is held out is looked at, by validation.pairs pairs of timestep and noise.", max_validation_steps=None
    ),
    **nothing(
        "adapters are adapter.safetensors in float32; `diffgraft convert` writes other formats and precisions.",
        save_precision=None,
        save_model_as="safetensors",
        use_safetensors=False,
    ),
    **nothing(
        "nothing that was saved is removed here.",
        save_last_n_epochs=None,
        save_last_n_epochs_state=None,
        save_last_n_steps=None,
        save_last_n_steps_state=None,
        save_n_epoch_ratio=None,
    ),
    **nothing(
        "checkpoints are kept every checkpoint_every steps here, whatever else is saved.",
        save_state=False,
        save_state_on_train_end=False,
    ),
    **nothing("a run has a folder of its own here: add output=FOLDER.", output_dir=None, output_name=None),
    **nothing(
        "the file tells of the recipe by itself here.",
        training_comment=None,
        no_metadata=False,
        metadata_author=None,
        metadata_description=None,
        metadata_license=None,
        metadata_tags=None,
        metadata_title=None,
        metadata_usage_hint=None,
        metadata_thumbnail=None,
        metadata_merged_from=None,
        metadata_trigger_phrase=None,
        metadata_preprocessor=None,
        metadata_is_negative_embedding=None,
    ),
    **nothing(
        "samples are drawn with the base's own scheduler here, and before training as well.",
        sample_sampler="ddim",
        sample_at_first=False,
    ),
    **nothing(
        "nothing is uploaded here.",
        huggingface_repo_id=None,
        huggingface_repo_type=None,
        huggingface_path_in_repo=None,
        huggingface_token=None,
        huggingface_repo_visibility=None,
        save_state_to_huggingface=False,
        resume_from_huggingface=False,
        async_upload=False,
    ),
    **nothing(
        "trackers take their own settings from the environment.",
        log_prefix=None,
        log_tracker_name=None,
        log_tracker_config=None,
        wandb_run_name=None,
        wandb_api_key=None,
        log_config=False,
    ),
    **nothing("inpainting bases learn as if all were to be drawn here.", train_inpainting=False),
    **nothing("data sets of one's own code cannot be read here.", dataset_class=None, debug_dataset=False),
}
"""Keys without a counterpart"""

IDLE: dict[str, Any] = {
    **dict.fromkeys(("v2", "sdpa", "xformers", "mem_eff_attn", "diffusers_xformers"), False),
    **dict.fromkeys(("no_half_vae", "lowram", "highvram", "cache_info", "skip_cache_check"), False),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "persistent_data_loader_workers"), False),
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), False),
    **dict.fromkeys(("disable_mmap_load_safetensors", "console_log_simple", "output_config"), False),
    **dict.fromkeys(("tokenizer_cache_dir", "console_log_level", "console_log_file", "config_file"), None),
    **dict.fromkeys(("no_token_padding",), False),
    **dict.fromkeys(("epoch", "noise_offset_type"), None),  # which the GUI writes beside them
    "vae_batch_size": 1,
    "max_data_loader_n_workers": 8,
}
"""Keys that change how fast or from where, and not what is learnt: attention of any kind, caches, loading"""

JOINT: dict[str, Any] = {
    **dict.fromkeys(("train_data_dir", "reg_data_dir", "in_json", "dataset_config", "caption_extention")),
    **{"caption_extension": ".caption", "dataset_repeats": 1, "prior_loss_weight": 1.0},
    **{"train_batch_size": 1, "max_train_steps": 1600, "max_train_epochs": None, "gui_epoch": None, "seed": None},
    **{"learning_rate": 2e-6, "unet_lr": None, "text_encoder_lr": None, "max_grad_norm": 1.0},
    **{"network_train_unet_only": False, "network_train_text_encoder_only": False},
    **{"learning_rate_te": None, "learning_rate_te1": None, "learning_rate_te2": None},
    **{"train_text_encoder": False, "stop_text_encoder_training": None},
    **{"optimizer_type": "", "optimizer_args": None, "use_8bit_adam": False, "use_lion_optimizer": False},
    **{"lr_scheduler": "constant", "lr_scheduler_type": "", "lr_scheduler_args": None, "lr_warmup_steps": 0},
    **{"lr_scheduler_num_cycles": 1, "lr_scheduler_power": 1, "lr_decay_steps": 0, "lr_scheduler_timescale": None},
    **{"lr_scheduler_min_lr_ratio": None},
    **{"loss_type": "l2", "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0, "min_snr_gamma": None},
    **{"scale_v_pred_loss_like_noise_pred": False, "min_timestep": None, "max_timestep": None},
    **{"noise_offset": None, "ip_noise_gamma": None, "clip_skip": None},
    **{"noise_offset_random_strength": False, "ip_noise_gamma_random_strength": False},
    **{"multires_noise_iterations": None, "multires_noise_discount": 0.3},
    **{"resolution": None, "enable_bucket": False, "min_bucket_reso": 256, "max_bucket_reso": 1024},
    **{"bucket_reso_steps": 64, "bucket_no_upscale": False},
    **{"keep_tokens": 0, "keep_tokens_separator": "", "caption_prefix": None, "caption_suffix": None},
    **{"masked_loss": False, "alpha_mask": False, "conditioning_data_dir": None},
    **{"save_every_n_steps": None, "save_every_n_epochs": None, "sample_every_n_steps": None},
    **{"sample_every_n_epochs": None, "sample_prompts": None, "validate_every_n_epochs": None},
    **{"log_with": None, "logging_dir": None},
    **{"token_string": None, "init_word": None, "num_vectors_per_token": 1, "weights": None},
    **{"use_object_template": False, "use_style_template": False},
}
"""Keys that only several together, or with the pictures, say what is meant"""

DEFAULTS = {**only(PLAIN, NOTHING, NETWORK), **IDLE, **JOINT}
"""Every key of sd-scripts that is known here, and its default"""

OPTIMIZERS: dict[str, Peer] = {
    **{"adamw": ADAMW, "adamw8bit": ADAMW_8BIT, "pagedadamw8bit": paged(ADAMW_8BIT)},
    **{"pagedadamw": paged(ADAMW), "pagedadamw32bit": paged(ADAMW)},
    **{"lion": LION, "lion8bit": LION_8BIT, "pagedlion8bit": paged(LION_8BIT)},
    **{"adafactor": ADAFACTOR, "prodigy": PRODIGY, "adamwschedulefree": SCHEDULE_FREE},
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
}
