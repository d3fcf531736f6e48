"""What other tools call the settings of a recipe: for who types one of their names here."""

from diffgraft.trainers.imports.kohya_keys import PLAIN as KOHYA
from diffgraft.trainers.imports.onetrainer_keys import PLAIN as ONETRAINER

_MORE = {
    **dict.fromkeys(("network_dim", "lora_rank", "lora_dim", "r", "dim"), "rank"),
    **dict.fromkeys(("network_alpha", "lora_alpha"), "alpha"),
    **dict.fromkeys(("conv_dim", "conv_rank"), "options.conv_rank"),
    "conv_alpha": "options.conv_alpha",
    **dict.fromkeys(("network_module", "network_type", "algo", "adapter", "lora_type"), "method"),
    **dict.fromkeys(("dora", "use_dora", "dora_wd", "lora_decompose"), "options.dora"),
    **dict.fromkeys(("rslora", "use_rslora", "rs_lora"), "options.rslora"),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio"), "options.up_rate"),
    **dict.fromkeys(("learning_rate", "unet_lr", "rate"), "lr"),
    **dict.fromkeys(("text_encoder_lr", "text_encoder_learning_rate", "learning_rate_te"), "rates.text_encoder"),
    **dict.fromkeys(("train_text_encoder", "text_encoder_train"), "text_encoder"),
    **dict.fromkeys(("max_train_steps", "max_steps", "train_steps", "num_steps", "iterations"), "steps"),
    **dict.fromkeys(("max_train_epochs", "num_train_epochs", "num_epochs", "epochs", "epoch"), "steps"),
    **dict.fromkeys(("train_batch_size", "batch_size", "per_device_train_batch_size"), "batch"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation", "grad_accum"), "accumulate"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "learning_rate_scheduler", "scheduler"), "lr_schedule"),
    **dict.fromkeys(("lr_warmup_steps", "warmup_steps", "learning_rate_warmup_steps"), "warmup"),
    **dict.fromkeys(("lr_scheduler_num_cycles", "lr_num_cycles", "learning_rate_cycles"), "lr_cycles"),
    **dict.fromkeys(("optimizer_type", "optim"), "optimizer"),
    **dict.fromkeys(("model", "model_name", "pretrained_model", "pretrained_model_name_or_path", "ckpt"), "base"),
    **dict.fromkeys(
        ("train_data_dir", "instance_data_dir", "instance_data_root", "data_dir", "dataset", "folder", "image_dir"),
        "images",
    ),
    **dict.fromkeys(("reg_data_dir", "class_data_dir", "class_data_root"), "prior.folder"),
    **dict.fromkeys(("num_class_images", "class_images"), "prior.images"),
    **dict.fromkeys(("prior_loss_weight", "prior_weight", "with_prior_preservation"), "prior.weight"),
    **dict.fromkeys(("output_dir", "output_name", "out", "output_model_destination", "logging_dir"), "output"),
    "instance_prompt": "prompt",
    **dict.fromkeys(("trigger_word", "token", "token_string", "placeholder_token", "identifier"), "trigger"),
    **dict.fromkeys(("class", "class_word", "class_token", "class_name"), "subject"),
    "initializer_token": "options.start",
    "num_vectors": "options.vectors",
    "num_vectors_per_token": "options.vectors",
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision", "train_dtype"), "precision"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization"), "quantize"),
    **dict.fromkeys(("use_8bit_adam",), "optimizer"),
    **dict.fromkeys(("min_snr_gamma", "snr_gamma"), "loss.snr_gamma"),
    **dict.fromkeys(("loss_type", "loss_fn"), "loss.kind"),
    **dict.fromkeys(("huber_c",), "loss.delta"),
    **dict.fromkeys(("noise_offset", "offset_noise_weight"), "noise.offset"),
    "multires_noise_iterations": "noise.pyramid",
    **dict.fromkeys(("ip_noise_gamma", "input_perturbation"), "noise.perturbation"),
    **dict.fromkeys(("min_timestep",), "timesteps.first"),
    **dict.fromkeys(("max_timestep",), "timesteps.last"),
    **dict.fromkeys(("use_ema", "ema_decay"), "ema"),
    **dict.fromkeys(("save_every_n_steps", "checkpointing_steps", "save_steps", "save_every"), "checkpoint_every"),
    **dict.fromkeys(("sample_every_n_steps", "sample_steps", "validation_steps"), "sample_every"),
    **dict.fromkeys(("validation_prompt", "sample_prompt", "prompts"), "sample_prompts"),
    **dict.fromkeys(("enable_bucket", "aspect_ratio_bucketing", "bucketing"), "buckets.use"),
    "min_bucket_reso": "buckets.least",
    "max_bucket_reso": "buckets.most",
    "bucket_reso_steps": "buckets.step",
    "bucket_no_upscale": "buckets.upscale",
    **dict.fromkeys(("num_repeats", "dataset_repeats"), "repeats"),
    **dict.fromkeys(("shuffle_tags", "shuffle_caption", "shuffle_tokens"), "tags.shuffle"),
    **dict.fromkeys(("keep_tokens", "keep_tags_count"), "tags.keep"),
    **dict.fromkeys(("masked_training", "masked_loss", "alpha_mask"), "masks.use"),
    **dict.fromkeys(("random_flip", "flip_aug", "hflip", "mirror"), "flip"),
    **dict.fromkeys(("size", "image_size", "res", "width"), "resolution"),
    **dict.fromkeys(("network_weights", "resume_from", "lora_model_name"), "init_from"),
    **dict.fromkeys(("report_to", "log_with", "logger"), "trackers"),
    **dict.fromkeys(("save_model_as", "save_format", "output_format"), "format"),
    **dict.fromkeys(("xformers", "sdpa", "enable_xformers_memory_efficient_attention", "mem_eff_attn"), "attention"),
    **dict.fromkeys(("target_modules", "layer_filter"), "layers"),
    "max_token_length": "long_prompts",
    "random_seed": "seed",
}
"""Names that stand for one of our keys, though not always with the same values"""


def synonym(key: str) -> str:
    """Our key for a setting that another tool calls `key`; empty where none is known."""
    name = key.lower().lstrip("-").replace("-", "_")
    imported = {theirs: rule.to for table in (ONETRAINER, KOHYA) for theirs, rule in table.items() if rule.to}
    return {**imported, **_MORE}.get(name, "")
