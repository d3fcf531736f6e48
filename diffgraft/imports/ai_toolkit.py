"""Conversion of ai-toolkit's training jobs to recipes: LoRA and LoKr on captioned pictures.

Keys and defaults are those of ``toolkit/config_modules.py``, and of the jobs in ``config/examples``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.flow import drop_meaningless
from diffgraft.imports.import_report import ImportReport, KeyRule, defaults_of, map_table, short, unsupported

KINDS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
"""Types of the processes that train on pictures"""
_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}
_OPTIMIZERS = {name: name for name in ("adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "prodigy")}
_SCHEDULES = {name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts")}
_QUANTIZED = {"qfloat8": "int8", "float8": "int8", "qint8": "int8", "uint8": "int8", "qint4": "nf4", "uint4": "nf4"}

TABLE = {
    "model.name_or_path": KeyRule(None, "base"),
    "network.type": KeyRule("lora", "method", {name: name for name in ("lora", "locon", "lokr")}),
    "network.linear": KeyRule(4, "rank", kind=int),
    "network.linear_alpha": KeyRule(1.0, "alpha", kind=float),
    "train.steps": KeyRule(1000, "steps", kind=int),
    "train.lr": KeyRule(1e-6, "lr", kind=float),
    "train.batch_size": KeyRule(1, "batch", kind=int),
    "train.gradient_accumulation_steps": KeyRule(1, "accumulate", kind=int),
    "train.optimizer": KeyRule("adamw", "optimizer", _OPTIMIZERS),
    "train.lr_scheduler": KeyRule("constant", "lr_schedule", _SCHEDULES),
    "train.dtype": KeyRule("fp32", "precision", _PRECISIONS),
    "train.gradient_checkpointing": KeyRule(True, "gradient_checkpointing", kind=bool),
    "train.train_text_encoder": KeyRule(True, "text_encoder", kind=bool),
    "train.min_snr_gamma": KeyRule(None, "loss.snr_gamma", kind=float),
    "train.noise_offset": KeyRule(0.0, "noise.offset", kind=float),
    "train.max_grad_norm": KeyRule(1.0, "max_grad_norm", kind=float),
    "save.save_every": KeyRule(1000, "adapter_every", kind=int),
    "sample.sample_every": KeyRule(100, "sample_every", kind=int),
    "dataset.folder_path": KeyRule(None, "images"),
    "dataset.caption_dropout_rate": KeyRule(0.0, "caption_dropout", kind=float),
    "dataset.shuffle_tokens": KeyRule(False, "tags.shuffle", kind=bool),
    "dataset.token_dropout_rate": KeyRule(0.0, "tags.drop", kind=float),
    "dataset.keep_tokens": KeyRule(0, "tags.keep", kind=int),
    "dataset.num_repeats": KeyRule(1, "repeats", kind=int),
    "dataset.flip_x": KeyRule(False, "flip", kind=bool),
    **unsupported(
        "layers of convolutions have the rank and alpha of all others.",
        **{"network.conv": None, "network.conv_alpha": None},
    ),
    **unsupported("set options.dropout.", **{"network.dropout": None}),
    **unsupported("set options.factor.", **{"network.lokr_factor": -1}),
    **unsupported(
        "it prefers some timesteps: set timesteps.mean, above 0 for composition and below 0 for style.",
        **{"train.content_or_style": "balanced"},
    ),
    **unsupported(
        "settings of optimizers are fixed.", **{"train.optimizer_params": {}, "train.lr_scheduler_params": {}}
    ),
    **unsupported("the loss is the squared error: set loss.kind.", **{"train.loss_type": "mse"}),
    **unsupported("adapters are saved in float32.", **{"save.dtype": "float16", "save.save_dtype": "float16"}),
    **unsupported("all are kept.", **{"save.max_step_saves_to_keep": 5}),
    **unsupported("captions are .txt files beside the pictures, or a metadata file.", **{"dataset.caption_ext": "txt"}),
    **unsupported("set masks.use=true and give masks as files.", **{"dataset.mask_path": None}),
    **unsupported("set prior.folder.", **{"dataset.is_reg": False}),
    **unsupported("set caption.", **{"dataset.default_caption": None}),
    **unsupported("only horizontal flips are drawn.", **{"dataset.flip_y": False}),
    **unsupported("samples have the base's native size and guidance.", **{"sample.width": 512, "sample.height": 512}),
    **unsupported("samples have the base's native size and guidance.", **{"sample.guidance_scale": 7}),
    **unsupported("samples have 25 steps.", **{"sample.sample_steps": 20}),
    **unsupported("set validation.", **{"sample.neg": ""}),
}
"""Keys of a process, and as `dataset.KEY` those of its first data set; keys that mean something together are apart"""
_IDLE = (
    *("type", "training_folder", "device", "performance_log_every", "train.train_unet", "train.noise_scheduler"),
    *("train.skip_first_sample", "train.disable_sampling", "train.linear_timesteps", "train.cache_text_embeddings"),
    *("train.unload_text_encoder", "train.gradient_accumulation", "save.push_to_hub", "model.low_vram", "model.arch"),
    *("model.is_flux", "model.is_xl", "model.is_v2", "model.is_v3", "model.quantize_te", "model.qtype_te"),
    *("dataset.cache_latents", "dataset.cache_latents_to_disk", "dataset.buckets", "sample.sampler", "sample.seed"),
    *("sample.walk_seed", "sample.format", "logging.log_every", "logging.use_ui_logger", "network.transformer_only"),
)
"""Keys without an effect on what is learnt"""
_APART: Mapping[str, Any] = {
    "trigger_word": None,
    "train.timestep_type": "sigmoid",
    "train.ema_config": None,
    "model.quantize": False,
    "model.qtype": "qfloat8",
    "dataset.resolution": 512,
    "sample.prompts": [],
}
_TIMESTEPS: Mapping[str, dict[str, Any]] = {
    "sigmoid": {"timesteps.distribution": "logit-normal"},
    "linear": {"timesteps.distribution": "uniform"},
    "weighted": {"timesteps.distribution": "uniform"},
    "shift": {"timesteps.distribution": "uniform", "timesteps.shift": "size"},
    "flux_shift": {"timesteps.distribution": "uniform", "timesteps.shift": "size"},
    "lumina2_shift": {"timesteps.distribution": "uniform", "timesteps.shift": "size"},
}
"""Kind of timesteps of flow-matching bases → recipe keys"""


def convert_training(process: Mapping[str, Any], file: Path) -> ImportReport:
    """Convert a process that trains on pictures to a recipe of captioned pictures.

    Raises:
        DiffgraftError: it names no data set with a folder of pictures.
    """
    for name in ("network", "train", "model", "save", "sample"):
        if not isinstance(process.get(name, {}), Mapping):
            raise DiffgraftError(f"{file} has {name}={short(process[name])}: this section needs keys and values.")
    datasets = process.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets else None
    if not isinstance(first, Mapping) or not first.get("folder_path"):
        raise DiffgraftError(f"{file} names no pictures: its first process needs datasets with a folder_path.")
    report = _report(process, first)
    map_table(report, TABLE)
    model = process.get("model") if isinstance(process.get("model"), Mapping) else {}
    is_transformer = bool(model.get("is_flux") or model.get("is_v3") or model.get("arch"))  # type: ignore[union-attr]
    report.recipe["layers"] = "attention+feedforward" if is_transformer else "attention"
    if is_transformer:
        _map_timesteps(report)
        drop_meaningless(report)
    if word := report.text("trigger_word"):
        report.map("trigger", word, "trigger_word")
        report.recipe["insert_trigger"] = True
    _map_ema(report)
    if report.flag("model.quantize"):
        kind = _QUANTIZED.get(report.text("model.qtype").lower(), "int8")
        report.map("quantize", kind, "model.quantize", remark="the nearest kind")
    sizes = report.get("dataset.resolution")
    sides = [side for side in (sizes if isinstance(sizes, list) else [sizes]) if type(side) is int]
    if sides:
        remark = "a run has one resolution, and buckets of its area" if len(sides) > 1 else ""
        report.map("resolution", max(sides), "dataset.resolution", remark=remark)
    prompts = report.get("sample.prompts")
    if isinstance(prompts, list) and prompts:
        plain = [str(prompt).replace("{", "(").replace("}", ")") for prompt in prompts]
        words = [prompt.replace("[trigger]", "{trigger}") for prompt in plain]
        report.map("sample_prompts", words, "sample.prompts")
    if len(datasets or ()) > 1:
        report.drop_part("datasets", f"{len(datasets or ())} entries", "a recipe has one: the first is used.")
    report.drop_unknown()
    return report


def _report(process: Mapping[str, Any], dataset: Mapping[str, Any]) -> ImportReport:
    """Return the report on a process with sections, and on its first data set."""
    sections = [(name, value) for name, value in process.items() if isinstance(value, Mapping)]
    values = {key: value for key, value in process.items() if not isinstance(value, Mapping) and key != "datasets"}
    values |= {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
    values |= {f"dataset.{key}": value for key, value in dataset.items()}
    file_keys = {f"dataset.{key}": f"datasets.{key}" for key in dataset}
    report = ImportReport("ai-toolkit", values, {**defaults_of(TABLE), **_APART, **dict.fromkeys(_IDLE)}, file_keys)
    report.recipe |= {"task": "style", "trigger": "", "caption": "{caption}", "prior.weight": 0, "previews": False}
    report.recipe["buckets.use"] = True
    return report


def _map_timesteps(report: ImportReport) -> None:
    """Map the kind of timesteps, which only flow-matching bases have."""
    kind = report.text("train.timestep_type")
    keys = _TIMESTEPS.get(kind)
    if keys is None:
        report.drop("train.timestep_type", "set timesteps.distribution and timesteps.shift.")
        return
    for key, value in keys.items():
        remark = "its weights of the loss are not supported" if kind == "weighted" else ""
        report.map(key, value, "train.timestep_type", remark=remark)


def _map_ema(report: ImportReport) -> None:
    """Map the average of the weights, a mapping of its own."""
    settings = report.get("train.ema_config")
    if isinstance(settings, Mapping) and settings.get("use_ema"):
        decay = settings.get("ema_decay", 0.995)
        report.map("ema", decay, "train.ema_config")
