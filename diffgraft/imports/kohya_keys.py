"""Arguments of kohya's sd-scripts: their defaults, the recipe keys they map to, and those without a counterpart.

Names and defaults as in sd-scripts of February 2026: `train_network.py`, `train_db.py`, `fine_tune.py`,
`train_textual_inversion.py`, their `sdxl_` forms, and what they take from `library/`.
"""

from typing import Any

from diffgraft.imports.import_report import KeyRule, defaults_of, unsupported
from diffgraft.imports.kohya_network import NETWORK
from diffgraft.imports.optimizers import (
    ADAFACTOR,
    ADAMW,
    ADAMW_8BIT,
    LION,
    LION_8BIT,
    PRODIGY,
    SCHEDULE_FREE,
    OptimizerRule,
    paged,
)

MAPPED = {
    "pretrained_model_name_or_path": KeyRule(None, "base"),
    "gradient_accumulation_steps": KeyRule(1, kind=int),
    "gradient_checkpointing": KeyRule(False, "gradient_checkpointing", kind=bool),
    "mixed_precision": KeyRule("no", "precision", {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}),
    "torch_compile": KeyRule(False, "compile", kind=bool),
    "flip_aug": KeyRule(False, "flip", kind=bool),
    "random_crop": KeyRule(
        False, "crop", {True: "random", False: "center"}, bool, "`crops` positions of each image are used in turn"
    ),
    "shuffle_caption": KeyRule(False, "tags.shuffle", kind=bool),
    "caption_separator": KeyRule(",", "tags.separator"),
    "caption_tag_dropout_rate": KeyRule(0.0, "tags.drop", kind=float),
    "caption_dropout_rate": KeyRule(0.0, "caption_dropout", kind=float),
    "debiased_estimation_loss": KeyRule(False, "loss.debiased", kind=bool),
    "v_parameterization": KeyRule(False, "prediction_type", {True: "v_prediction", False: None}, bool),
    "zero_terminal_snr": KeyRule(False, "zero_snr", {True: True, False: None}, bool),
    "max_token_length": KeyRule(
        None,
        "long_prompts",
        {None: None, 75: None, 150: "chunk", 225: "chunk"},
        int,
        "prompts may be of any length",
    ),
    "enable_wildcard": KeyRule(
        False, "captions.lines", {True: "random", False: None}, bool, "{a|b} in captions is not expanded"
    ),
    "validation_split": KeyRule(0.0, "validation.share", kind=float),
    "validate_every_n_steps": KeyRule(None, "validation.every", kind=int),
}
"""Arguments that map to one recipe key"""

_AUGMENTATION = "this augmentation is not supported."
_WORDS = "only tags.… change captions; change the .txt files instead."
UNSUPPORTED = {
    **unsupported("the base's own VAE is used: to use another, put it into the base's folder.", vae=None),
    **unsupported("weights in brackets are not interpreted in captions.", weighted_captions=False),
    **unsupported("noise.offset is equal for all images.", adaptive_noise_scale=None),
    **unsupported("this loss term is not supported.", v_pred_like_loss=None),
    **unsupported(_AUGMENTATION, color_aug=False, face_crop_aug_range=None),
    **unsupported("images are always scaled with the Lanczos filter.", resize_interpolation=None),
    **unsupported(_WORDS, secondary_separator=None, token_warmup_min=1, token_warmup_step=0),
    **unsupported("captions are dropped only at random, by caption_dropout.", caption_dropout_every_n_epochs=0),
    **unsupported("the adapter's strength is equal in all data sets.", network_multiplier=1.0),
    **unsupported("not supported; prior.by=prediction preserves the base's predictions.", custom_attributes=None),
    **unsupported(
        "trainable parameters are float32; `precision` is that of the base and the computation.",
        full_fp16=False,
        full_bf16=False,
    ),
    **unsupported("not supported; use quantize=int8 or nf4 for a smaller base.", fp8_base=False, fp8_base_unet=False),
    **unsupported("activations are not offloaded to the CPU.", cpu_offload_checkpointing=False),
    **unsupported(
        "not supported; the optimizer steps after the backward pass.",
        fused_backward_pass=False,
        fused_optimizer_groups=None,
    ),
    **unsupported("blocks are set by name: lr_scale.IN04=0.5.", block_lr=None),
    **unsupported(
        "set up DeepSpeed with `accelerate config`.",
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
    **unsupported(
        "set up processes with `accelerate config`.",
        ddp_timeout=None,
        ddp_gradient_as_bucket_view=False,
        ddp_static_graph=False,
        dynamo_backend="inductor",
        num_processes=1,
        num_machines=1,
        multi_gpu=False,
        gpu_ids=None,
    ),
    **unsupported(
        "resume runs with: diffgraft train --resume FOLDER; states of other tools cannot be resumed.",
        resume=None,
        initial_epoch=None,
        initial_step=None,
        skip_until_initial_step=False,
    ),
    **unsupported("images are held out by the hash of their content.", validation_seed=None),
    **unsupported(
        "validation uses all held-out images, with validation.pairs pairs of timestep and noise.",
        max_validation_steps=None,
    ),
    **unsupported(
        "adapters are saved as float32 adapter.safetensors; `diffgraft convert` writes other formats and precisions.",
        save_precision=None,
        save_model_as="safetensors",
        use_safetensors=False,
    ),
    **unsupported(
        "saved adapters are never removed.",
        save_last_n_epochs=None,
        save_last_n_epochs_state=None,
        save_last_n_steps=None,
        save_last_n_steps_state=None,
        save_n_epoch_ratio=None,
    ),
    **unsupported(
        "checkpoints are written every checkpoint_every steps, independently of adapters.",
        save_state=False,
        save_state_on_train_end=False,
    ),
    **unsupported("each run has a folder of its own: set output=FOLDER.", output_dir=None, output_name=None),
    **unsupported(
        "the adapter's header always contains the recipe.",
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
    **unsupported(
        "samples use the base's own scheduler, and are also generated before training.",
        sample_sampler="ddim",
        sample_at_first=False,
    ),
    **unsupported(
        "uploads are not supported.",
        huggingface_repo_id=None,
        huggingface_repo_type=None,
        huggingface_path_in_repo=None,
        huggingface_token=None,
        huggingface_repo_visibility=None,
        save_state_to_huggingface=False,
        resume_from_huggingface=False,
        async_upload=False,
    ),
    **unsupported(
        "trackers read their settings from the environment.",
        log_prefix=None,
        log_tracker_name=None,
        log_tracker_config=None,
        wandb_run_name=None,
        wandb_api_key=None,
        log_config=False,
    ),
    **unsupported("inpainting bases are trained with a mask of the whole image.", train_inpainting=False),
    **unsupported("custom dataset classes are not supported.", dataset_class=None, debug_dataset=False),
}
"""Arguments without a counterpart"""

IDLE: dict[str, Any] = {
    **dict.fromkeys(("v2", "sdpa", "xformers", "mem_eff_attn", "diffusers_xformers"), False),
    **dict.fromkeys(("no_half_vae", "lowram", "highvram", "cache_info", "skip_cache_check"), False),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "persistent_data_loader_workers"), False),
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), False),
    **dict.fromkeys(("disable_mmap_load_safetensors", "console_log_simple", "output_config"), False),
    **dict.fromkeys(("tokenizer_cache_dir", "console_log_level", "console_log_file", "config_file"), None),
    **dict.fromkeys(("no_token_padding",), False),
    **dict.fromkeys(("epoch", "noise_offset_type"), None),  # written by the GUI
    "vae_batch_size": 1,
    "max_data_loader_n_workers": 8,
}
"""Arguments that affect speed and loading, but not the result: attention kernels, caches, workers"""

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
"""Arguments that are mapped together with others, or depend on the images"""

DEFAULTS = {**defaults_of(MAPPED, UNSUPPORTED, NETWORK), **IDLE, **JOINT}
"""Every known argument of sd-scripts, with its default"""

OPTIMIZERS: dict[str, OptimizerRule] = {
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
