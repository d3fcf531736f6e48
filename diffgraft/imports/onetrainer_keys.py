"""Settings of OneTrainer: their defaults, the recipe keys they map to, and those without a counterpart.

Names and defaults as in OneTrainer of August 2026 (`TrainConfig`, `ConceptConfig`, `SampleConfig`), nested with dots.
"""

from typing import Any

from diffgraft.imports.import_report import KeyRule, defaults_of, unsupported
from diffgraft.imports.optimizers import OptimizerRule

MAPPED = {
    "base_model_name": KeyRule("stable-diffusion-v1-5/stable-diffusion-v1-5", "base"),
    "batch_size": KeyRule(1, "batch", kind=int),
    "gradient_accumulation_steps": KeyRule(1, "accumulate", kind=int),
    "train_dtype": KeyRule(
        "FLOAT_16",
        "precision",
        {"FLOAT_32": "float32", "TFLOAT_32": "float32", "FLOAT_16": "float16", "BFLOAT_16": "bfloat16"},
    ),
    "compile": KeyRule(False, "compile", kind=bool),
    "unet.gradient_checkpointing": KeyRule(True, "gradient_checkpointing", kind=bool),
    "offset_noise_weight": KeyRule(0.0, "noise.offset", kind=float),
    "latent_caching": KeyRule(True, "cache", kind=bool),
    "concepts.image.enable_random_flip": KeyRule(False, "flip", kind=bool),
    "concepts.text.enable_tag_shuffling": KeyRule(False, "tags.shuffle", kind=bool),
    "concepts.text.tag_delimiter": KeyRule(",", "tags.separator"),
}
"""Settings that map to one recipe key"""

_AUGMENTATION = "this augmentation is not supported."
_TAGS = "tags can only be shuffled and dropped, all with the same probability."
_STEPS_ONLY = "intervals are in steps, and runs are resumed from checkpoints: set checkpoint_every."
UNSUPPORTED = {
    **unsupported(
        _AUGMENTATION,
        **{
            f"concepts.image.enable_{how}_{what}": False
            for how in ("random", "fixed")
            for what in ("rotate", "brightness", "contrast", "saturation", "hue")
        },
    ),
    **unsupported(
        _AUGMENTATION,
        **{
            "concepts.image.enable_fixed_flip": False,
            "force_circular_padding": False,
            "concepts.image.enable_random_circular_mask_shrink": False,
            "concepts.image.enable_random_mask_rotate_crop": False,
        },
    ),
    **unsupported("a run has one resolution.", **{"concepts.image.enable_resolution_override": False}),
    **unsupported(
        _TAGS, **{"concepts.text.tag_dropout_special_tags_mode": "NONE", "concepts.text.caps_randomize_enable": False}
    ),
    **unsupported("a text is chosen anew each time an image is used.", **{"concepts.text_variations": 1}),
    **unsupported(
        "captions of images in subfolders are read only from a metadata.jsonl.",
        **{"concepts.include_subdirectories": False},
    ),
    **unsupported(
        "the text encoder's last layer is used, in XL the last but one; this cannot be changed.",
        text_encoder_layer_skip=0,
        text_encoder_2_layer_skip=0,
    ),
    **unsupported("adapters have no dropout.", dropout_probability=0.0),
    **unsupported("trainable parameters are float32.", lora_weight_dtype="FLOAT_32", embedding_weight_dtype="FLOAT_32"),
    **unsupported("noise.offset is equal at all timesteps.", generalized_offset_noise=False),
    **unsupported(
        "OneTrainer also perturbs the noise to be predicted; noise.perturbation perturbs only the input, as in the "
        "paper.",
        perturbation_noise_weight=0.0,
    ),
    **unsupported("masks apply to every step.", unmasked_probability=0.1),
    **unsupported(
        "not supported; prior.by=prediction preserves the class rather than what is outside of masks.",
        masked_prior_preservation_weight=0.0,
    ),
    **unsupported("inpainting bases are trained with a mask of the whole image.", custom_conditioning_image=False),
    **unsupported("the loss is the mean over the batch and all micro-batches.", loss_scaler="NONE"),
    **unsupported("learning rates always decay to 0.", learning_rate_min_factor=0.0),
    **unsupported("custom schedules are not supported.", custom_learning_rate_scheduler=None, scheduler_params=[]),
    **unsupported("choose layers with `layers`, or exclude patterns with lr_scale.", layer_filter_regex=False),
    **unsupported(
        "a run trains one token; use method=pivotal to train it along with weights.", additional_embeddings=[]
    ),
    **unsupported("set up several GPUs with `accelerate config`.", multi_gpu=False, device_indexes=""),
    **unsupported(
        "adapters are saved as adapter.safetensors; `diffgraft convert` writes other formats and precisions.",
        output_model_format="SAFETENSORS",
        output_dtype="FLOAT_32",
        bundle_additional_embeddings=True,
        include_train_config="NONE",
    ),
    **unsupported(
        "each run has a folder of its own: set output=FOLDER.",
        output_model_destination="models/model.safetensors",
        workspace_dir="workspace/run",
        save_filename_prefix="",
    ),
    **unsupported(
        "resume runs with: diffgraft train --resume FOLDER.", continue_last_backup=False, prevent_overwrites=False
    ),
    **unsupported(
        _STEPS_ONLY,
        backup_after=30,
        backup_after_unit="MINUTE",
        rolling_backup=False,
        rolling_backup_count=3,
        backup_before_save=True,
        save_skip_first=0,
        sample_skip_first=0,
    ),
    **unsupported(
        "samples use the weights that are saved, and are PNG files.",
        sample_image_format="JPG",
        non_ema_sampling=True,
        samples_to_tensorboard=True,
    ),
    **unsupported(
        "activations and layers are not offloaded.",
        **{"unet.offload_fraction": 0.0, "unet.activation_offloading": False},
    ),
    **unsupported(
        "the base's own VAE is used: to use another, put it into the base's folder.", **{"vae.model_name": ""}
    ),
    **unsupported(
        "all parts are read from the base's folder.",
        **{"unet.model_name": "", "text_encoder.model_name": "", "text_encoder_2.model_name": ""},
    ),
    **unsupported(
        "set the environment variables HF_HUB_OFFLINE and HF_HOME.", offline_mode=False, huggingface_cache_dir=""
    ),
    **unsupported("caching or debugging without training is not supported.", only_cache=False, debug_mode=False),
}
"""Settings without a counterpart"""

_PART = {
    "include": True,
    "train": True,
    "stop_training_after": None,
    "stop_training_after_unit": "NEVER",
    "learning_rate": None,
    "weight_dtype": "FLOAT_32",
    "dropout_probability": 0.0,
    "train_embedding": True,
    "attention_mask": False,
    "guidance_scale": 1.0,
    "gradient_checkpointing": True,
    "offload_fraction": 0.0,
    "activation_offloading": False,
    "model_name": "",
}
_TEXT_STOPS = {"stop_training_after": 30, "stop_training_after_unit": "EPOCH"}
PARTS = {
    f"{part}.{key}": value
    for part, stops in {"unet": {}, "text_encoder": _TEXT_STOPS, "text_encoder_2": _TEXT_STOPS, "vae": {}}.items()
    for key, value in {**_PART, **stops}.items()
}
"""Settings of a model's parts, with their defaults"""

JOINT: dict[str, Any] = {
    **{"training_method": "FINE_TUNE", "model_type": "STABLE_DIFFUSION_15", "peft_type": "LORA"},
    **{"lora_model_name": "", "lora_rank": 16, "lora_alpha": 1.0, "lora_decompose": False},
    **{"lora_decompose_norm_epsilon": True, "lora_decompose_output_axis": False},
    **{"lokr_dim": 16, "lokr_decompose_both": False, "lokr_decompose_factor": -1, "lokr_use_tucker": False},
    **{"lokr_weight_decompose": False, "lokr_dora_on_output": True, "lokr_full_matrix": False, "lokr_vec_trick": True},
    **{"oft_block_size": 32, "oft_block_share": False, "oft_scaled": False},
    **{"layer_filter": "", "layer_filter_preset": "full"},
    **{"embedding_learning_rate": None, "preserve_embedding_norm": False},
    **{"embedding.model_name": "", "embedding.placeholder": "<embedding>", "embedding.token_count": 1},
    **{"embedding.initial_embedding_text": "*", "embedding.uuid": None, "embedding.train": True},
    **{"embedding.stop_training_after": None, "embedding.stop_training_after_unit": "NEVER"},
    **{"embedding.is_output_embedding": False},
    **{"learning_rate": 3e-6, "learning_rate_scaler": "NONE", "learning_rate_scheduler": "CONSTANT"},
    **{"learning_rate_warmup_steps": 200.0, "learning_rate_cycles": 1.0, "epochs": 100, "clip_grad_norm": 1.0},
    **{"ema": "OFF", "ema_decay": 0.999, "ema_update_step_interval": 5},
    **{"mse_strength": 1.0, "mae_strength": 0.0, "log_cosh_strength": 0.0, "huber_strength": 0.0},
    **{"huber_delta": 1.0, "loss_weight_fn": "CONSTANT", "loss_weight_strength": 5.0},
    **{"rescale_noise_scheduler_to_zero_terminal_snr": False, "force_v_prediction": False},
    **{"force_epsilon_prediction": False, "min_noising_strength": 0.0, "max_noising_strength": 1.0},
    **{"timestep_shift": 1.0, "dynamic_timestep_shifting": False},
    **{"timestep_distribution": "UNIFORM", "noising_weight": 0.0, "noising_bias": 0.0},
    **{"resolution": "512", "aspect_ratio_bucketing": True, "masked_training": False, "unmasked_weight": 0.1},
    **{"normalize_masked_area_loss": False, "concept_file_name": "training_concepts/concepts.json", "concepts": None},
    **{"concepts.image.enable_crop_jitter": True, "concepts.image_variations": 1},
    **{"concepts.text.keep_tags_count": 1, "concepts.text.tag_dropout_enable": False},
    **{"concepts.text.tag_dropout_mode": "FULL", "concepts.text.tag_dropout_probability": 0.0},
    **{"sample_definition_file_name": "training_samples/samples.json", "samples": None, "sample_after": 10},
    **{"sample_after_unit": "MINUTE", "save_every": 0, "save_every_unit": "NEVER", "tensorboard": True},
    **{"validation": False, "validate_after": 1, "validate_after_unit": "EPOCH"},
}
"""Settings that are mapped together with others, or depend on the images"""

IDLE: dict[str, Any] = {
    **{"debug_dir": "debug", "cache_dir": "workspace-cache/run", "clear_cache_before_training": True},
    **{"dataloader_threads": 2, "train_device": None, "temp_device": "cpu", "fallback_train_dtype": "BFLOAT_16"},
    **{"enable_autocast_cache": True, "attention_mechanism": "SDP", "async_offloading": True, "frames": "25"},
    **{"tensorboard_expose": False, "tensorboard_always_on": False, "tensorboard_port": 6006},
    **{"gradient_reduce_precision": "FLOAT_32_STOCHASTIC", "fused_gradient_reduce": True},
    **{"async_gradient_reduce": True, "async_gradient_reduce_buffer": 100, "vb_loss_strength": 1.0},
    **{"sample_video_format": "MP4", "sample_audio_format": "MP3"},
    **{"text_encoder_sequence_length": 512, "text_encoder_2_sequence_length": 77},
    **{"text_encoder_3_layer_skip": 0, "text_encoder_4_layer_skip": 0},
}
"""Settings that affect speed and loading, but not the result, or that belong to other model families"""

APART = (
    *("prior", "transformer", "unconditional_transformer", "text_encoder_3", "text_encoder_4", "effnet_encoder"),
    *("decoder", "decoder_text_encoder", "decoder_vqgan", "quantization", "cloud", "secrets", "optimizer_defaults"),
)
"""Groups of settings that are ignored: parts of other model families, machines, and other optimizers"""

OPTIMIZER = "optimizer.optimizer"
DEFAULTS = {**PARTS, **defaults_of(MAPPED, UNSUPPORTED), **JOINT, **IDLE, OPTIMIZER: "ADAMW"}
"""Every known setting, with its default; the optimizer's own settings are in `OPTIMIZER_SETTINGS`"""

CONCEPT = {
    *("name", "path", "seed", "enabled", "type", "include_subdirectories", "image_variations", "text_variations"),
    *("balancing", "balancing_strategy", "loss_weight", "concept_stats", "image", "text"),
}
"""Keys of concepts"""
CONCEPT_TEXT = {
    *("prompt_source", "prompt_path", "enable_tag_shuffling", "tag_delimiter", "keep_tags_count", "tag_dropout_enable"),
    *("tag_dropout_mode", "tag_dropout_probability", "tag_dropout_special_tags_mode", "tag_dropout_special_tags"),
    *("tag_dropout_special_tags_regex", "caps_randomize_enable", "caps_randomize_probability", "caps_randomize_mode"),
    "caps_randomize_lowercase",
}
CONCEPT_IMAGE = {
    *("enable_crop_jitter", "enable_random_flip", "enable_fixed_flip", "enable_random_rotate", "enable_fixed_rotate"),
    *("random_rotate_max_angle", "enable_random_brightness", "enable_fixed_brightness"),
    *("random_brightness_max_strength", "enable_random_contrast", "enable_fixed_contrast"),
    *("random_contrast_max_strength", "enable_random_saturation", "enable_fixed_saturation"),
    *("random_saturation_max_strength", "enable_random_hue", "enable_fixed_hue", "random_hue_max_strength"),
    *("enable_resolution_override", "resolution_override", "enable_random_circular_mask_shrink"),
    "enable_random_mask_rotate_crop",
}

_BETAS = {"beta1": (0.9, 0.9), "beta2": (0.999, 0.999)}
_ADAM = {**_BETAS, "eps": (1e-8, 1e-8), "amsgrad": (False, False)}
_PRODIGY = {
    **_BETAS,
    **{"beta3": (None, None), "eps": (1e-8, 1e-8), "decouple": (False, True), "use_bias_correction": (False, True)},
    **{"safeguard_warmup": (False, True), "d0": (1e-6, 1e-6), "d_coef": (1.0, 1.0), "slice_p": (1, 1)},
}
_ADAFACTOR = {
    **{"relative_step": (False, False), "scale_parameter": (False, False), "warmup_init": (False, False)},
    **{"clip_threshold": (1.0, 1.0), "decay_rate": (-0.8, -0.8), "beta1": (None, None)},
}
_FREE = {**_BETAS, "eps": (1e-8, 1e-8), "r": (0.0, 0.0), "weight_lr_power": (2.0, 2.0)}
OPTIMIZERS: dict[str, OptimizerRule] = {
    "adamw": OptimizerRule("adamw", 0.01, _ADAM),
    "adamw_8bit": OptimizerRule("adamw8bit", 0.01, _ADAM),
    "lion": OptimizerRule("lion", 0.0, {"beta1": (0.9, 0.9), "beta2": (0.99, 0.99)}),
    "lion_8bit": OptimizerRule("lion8bit", 0.0, {"beta1": (0.9, 0.9), "beta2": (0.999, 0.99)}),
    "prodigy": OptimizerRule("prodigy", 0.0, _PRODIGY),
    "adafactor": OptimizerRule("adafactor", 0.0, _ADAFACTOR),
    "schedule_free_adamw": OptimizerRule("schedule-free", 0.01, _FREE),
}
_NOT_SET = (
    *("alpha", "beta1", "beta2", "beta3", "clip_threshold", "d0", "d_coef", "dampening", "decay_rate", "eps", "eps2"),
    *("growth_rate", "initial_accumulator_value", "initial_accumulator", "lr_decay", "max_unorm", "momentum", "r"),
    *("weight_decay", "weight_lr_power", "k", "xi", "n_sma_threshold", "slice_p", "prodigy_steps", "beta3_ema"),
    *("alpha_grad", "beta1_warmup", "min_beta1", "schedulefree_c", "ns_steps", "muon_hidden_layers", "muon_adam_lr"),
    *("muon_te1_adam_lr", "muon_te2_adam_lr", "beta2_normuon", "ortho_rank"),
)
_OFF = (
    *("adam_w_mode", "amsgrad", "bias_correction", "centered", "decouple", "maximize", "nesterov", "no_prox"),
    *("relative_step", "safeguard_warmup", "scale_parameter", "use_bias_correction", "warmup_init", "decoupled_decay"),
    *("fixed_decay", "rectify", "degenerated_to_sgd", "ams_bound", "adanorm", "adam_debias", "cautious", "use_speed"),
    *("use_cautious", "use_grams", "use_adopt", "use_orthograd", "nnmf_factor", "orthogonal_gradient", "use_atan2"),
    *("use_AdEMAMix", "Simplified_AdEMAMix", "kourkoutas_beta", "MuonWithAuxAdam", "muon_adam_regex", "is_paged"),
    *("normuon_variant", "low_rank_ortho", "accelerated_ns", "cautious_wd", "approx_mars", "auto_kappa_p"),
)
_ON = (
    *("weight_decay_by_lr", "split_groups", "split_groups_mean", "factored", "factored_fp32", "use_stableadamw"),
    *("d_limiter", "use_schedulefree", "rms_rescaling"),
)
OPTIMIZER_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_NOT_SET),
    **dict.fromkeys(_OFF, False),
    **dict.fromkeys(_ON, True),
    "muon_adam_config": {},
}
"""All settings of OneTrainer's optimizers that affect the result, with their defaults"""
OPTIMIZER_IDLE = {
    *("block_wise", "capturable", "differentiable", "foreach", "fsdp_in_use", "fused", "fused_back_pass", "log_every"),
    *("min_8bit_size", "quant_block_size", "optim_bits", "percentile_clipping", "stochastic_rounding", "use_triton"),
    "compile",
}
"""Settings of optimizers that affect speed or the precision of their state, but not the algorithm"""

SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
}
