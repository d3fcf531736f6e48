"""Conversion of text sliders to recipes: LECO's configuration and prompts, and the sliders among ai-toolkit's jobs.

LECO (and the sliders of Gandikota et al., which have its files) names the two ends positive and unconditional; an
action `erase` moves away from the positive one. ai-toolkit names them positive and negative.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError, short_repr
from diffgraft.imports.ai_toolkit import KINDS, convert_training
from diffgraft.imports.import_report import ImportReport, KeyRule, defaults_of, map_table, unsupported
from diffgraft.imports.reading import find_file, read_config

_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}
_OPTIMIZERS = {name: name for name in ("adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "prodigy")}
_SCHEDULES = {name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts")}
_LAYERS = {"lierla": "attention", "c3lier": "all"}
_NOISED = "pictures of the target are drawn once and noised, and not denoised in part in each step."
_PLACE = "a run writes into the folder that output=… names."

LECO = {
    "pretrained_model.name_or_path": KeyRule(None, "base"),
    "network.type": KeyRule("lierla", "layers", _LAYERS),
    "network.rank": KeyRule(4, "rank", kind=int),
    "network.alpha": KeyRule(1.0, "alpha", kind=float),
    "train.precision": KeyRule("bfloat16", "precision", _PRECISIONS),
    "train.iterations": KeyRule(500, "steps", kind=int),
    "train.lr": KeyRule(1e-4, "lr", kind=float),
    "train.optimizer": KeyRule("adamw", "optimizer", _OPTIMIZERS),
    "train.lr_scheduler": KeyRule("constant", "lr_schedule", _SCHEDULES),
    "save.per_steps": KeyRule(200, "adapter_every", kind=int),
    "other.use_xformers": KeyRule(False, "attention", {True: "xformers", False: "default"}, kind=bool),
    "prompt.batch_size": KeyRule(1, "batch", kind=int),
    "prompt.resolution": KeyRule(512, "resolution", kind=int),
    **unsupported(
        "the layers of self- and cross-attention are told apart by patterns: set lr_scale, as "
        '{"*.attn2.*": 0} for noxattn.',
        **{"network.training_method": "full"},
    ),
    **unsupported(_NOISED, **{"train.noise_scheduler": "ddim", "train.max_denoising_steps": 50}),
    **unsupported("settings of optimizers are fixed.", **{"train.optimizer_args": ""}),
    **unsupported(_PLACE, **{"save.path": "./output", "save.name": "untitled"}),
    **unsupported("adapters are saved in float32.", **{"save.precision": "float32"}),
    **unsupported("set trackers=wandb.", **{"logging.use_wandb": False}),
    **unsupported("a run has one resolution.", **{"prompt.dynamic_resolution": False, "prompt.dynamic_crops": False}),
    **unsupported("text encoders are read as their files say.", **{"pretrained_model.clip_skip": None}),
}
"""Keys of LECO with sections and, as `prompt.KEY`, those of an entry of its prompts; the axis is apart"""
_LECO_APART = {
    **dict.fromkeys(("prompts_file", "pretrained_model.v2", "pretrained_model.v_pred", "logging.verbose")),
    **dict.fromkeys((f"prompt.{key}" for key in ("target", "positive", "neutral")), None),
    **{"prompt.unconditional": "", "prompt.action": "erase", "prompt.guidance_scale": 1.0},
}

AI_TOOLKIT = {
    "model.name_or_path": KeyRule(None, "base"),
    "network.type": KeyRule("lierla", "layers", {**_LAYERS, "lora": "attention"}),
    "network.linear": KeyRule(4, "rank", kind=int),
    "network.linear_alpha": KeyRule(1.0, "alpha", kind=float),
    "train.steps": KeyRule(1000, "steps", kind=int),
    "train.lr": KeyRule(1e-6, "lr", kind=float),
    "train.batch_size": KeyRule(1, "batch", kind=int),
    "train.optimizer": KeyRule("adamw", "optimizer", _OPTIMIZERS),
    "train.lr_scheduler": KeyRule("constant", "lr_schedule", _SCHEDULES),
    "train.dtype": KeyRule("fp32", "precision", _PRECISIONS),
    "train.gradient_checkpointing": KeyRule(True, "gradient_checkpointing", kind=bool),
    "train.min_snr_gamma": KeyRule(None, "loss.snr_gamma", kind=float),
    "train.noise_offset": KeyRule(0.0, "noise.offset", kind=float),
    "train.train_text_encoder": KeyRule(False, "text_encoder", kind=bool),
    "save.save_every": KeyRule(1000, "adapter_every", kind=int),
    "sample.sample_every": KeyRule(100, "sample_every", kind=int),
    **unsupported(_NOISED, **{"train.noise_scheduler": "ddpm", "train.max_denoising_steps": 50}),
    **unsupported("set sample_prompts; samples are drawn at strength 1.", **{"sample.prompts": None}),
    **unsupported("preserve what must not change by loss.options.preserve.", **{"slider.anchors": None}),
    **unsupported("the weights of several targets have no meaning for one.", **{"target.weight": 1.0}),
    **unsupported("prompts keep the order of their parts.", **{"target.shuffle": False}),
}
"""Keys of a process of ai-toolkit and, as `target.KEY`, those of an entry of `slider.targets`; the axis is apart"""
_IDLE = ("type", "model.is_v2", "model.is_xl", "train.train_unet", "slider.batch_full_slide", "slider.targets")


def is_leco(config: Mapping[str, Any], prompts: Sequence[Any] | None) -> bool:
    """Whether a configuration is LECO's, or a list its prompts."""
    return _are_prompts(prompts) or {"prompts_file", "pretrained_model"} <= config.keys()


def is_ai_toolkit(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is a job of ai-toolkit."""
    return isinstance(config.get("config"), Mapping) and "process" in config["config"]


def _are_prompts(content: Any) -> bool:
    """Whether the content of a file is a list of LECO's prompts."""
    is_list = isinstance(content, list) and bool(content) and isinstance(content[0], Mapping)
    return is_list and "target" in content[0]


def convert_leco(config: Mapping[str, Any], file: Path, prompts: Sequence[Any] | None) -> ImportReport:
    """Convert LECO's configuration, its prompts, or both; without `prompts`, those of the file that it names.

    Raises:
        DiffgraftError: there are no prompts.
    """
    name = str(config.get("prompts_file") or "")
    if prompts is None and (found := find_file(name, file)) is not None:
        prompts = read_config(found)
    if prompts is None or not _are_prompts(prompts):
        raise DiffgraftError(
            f"{file} names the prompts {name!r}, which are not there: give their file as well, with a list of entries "
            "that have a target."
        )
    report = _new_report("LECO", config, {**defaults_of(LECO), **_LECO_APART}, ("prompt", prompts[0]))
    map_table(report, LECO if config else {key: rule for key, rule in LECO.items() if key.startswith("prompt.")})
    if report.flag("pretrained_model.v_pred"):
        report.map("prediction_type", "v_prediction", "pretrained_model.v_pred")
    target, negative = report.text("prompt.target"), report.text("prompt.unconditional")
    positive = report.text("prompt.positive") if "prompt.positive" in report.values else target
    neutral = report.text("prompt.neutral") if "prompt.neutral" in report.values else negative
    shift = (report.number("prompt.guidance_scale") or 1.0) * (1 if report.text("prompt.action") == "enhance" else -1)
    remark = ""
    if neutral != target and (neutral, target) == (negative, positive):
        shift, remark = shift - 1, "counted from the target, and not from neutral"
    elif neutral != target:
        report.drop("prompt.neutral", "the shift is added to the prediction for the target.")
    ends = [(positive, "prompt.positive"), (negative, "prompt.unconditional")]
    _map_axis(report, (target, "prompt.target"), ends if shift > 0 else ends[::-1])
    _map_option(report, "guidance", abs(shift), "prompt.guidance_scale", remark)
    if not shift:
        report.todo("loss.options.guidance", "this axis moves nothing: the target is where it would be moved to.")
    return _finish(report, len(prompts))


def convert_ai_toolkit(config: Mapping[str, Any], file: Path) -> ImportReport:
    """Convert a job of ai-toolkit, whose first process trains on pictures or is a slider.

    Raises:
        DiffgraftError: it is another kind of job, or has no targets.
    """
    processes = config["config"]["process"]
    process = processes[0] if isinstance(processes, list) and processes else None
    process = process if isinstance(process, Mapping) else {}
    kind, slider = process.get("type"), process.get("slider")
    if kind in KINDS:
        return convert_training(process, file)
    if kind not in ("slider", "concept_slider") or not isinstance(slider, Mapping):
        raise DiffgraftError(
            f"{file} is a job of ai-toolkit of type {short_repr(kind)}: only those of type "
            f"{', '.join(KINDS)}, slider and concept_slider can be read."
        )
    targets = slider.get("targets") if kind == "slider" else [slider]
    if not isinstance(targets, list) or not targets or not isinstance(targets[0], Mapping):
        raise DiffgraftError(
            f"{file} has no slider.targets: a slider needs one with target_class, positive and negative."
        )
    first = {key.removesuffix("_prompt"): value for key, value in targets[0].items()}
    rest = {key: value for key, value in process.items() if key != "slider" or kind == "slider"}
    apart: dict[str, Any] = {"target.target_class": "", "target.positive": "", "target.negative": ""}
    apart |= {"target.guidance_strength": 3.0, "slider.resolutions": None, "model.is_v_pred": False}
    apart |= dict.fromkeys(_IDLE)
    report = _new_report("ai-toolkit", rest, {**defaults_of(AI_TOOLKIT), **apart}, ("target", first))
    map_table(report, AI_TOOLKIT)
    if report.flag("model.is_v_pred"):
        report.map("prediction_type", "v_prediction", "model.is_v_pred")
    sizes = report.get("slider.resolutions")
    if isinstance(sizes, list) and sizes and isinstance(sizes[0], list) and sizes[0]:
        report.map("resolution", max(sizes[0]), "slider.resolutions", remark="squares of one size")
    ends = [(report.text(f"target.{key}"), f"target.{key}") for key in ("positive", "negative")]
    _map_axis(report, (report.text("target.target_class"), "target.target_class"), ends)
    if kind == "slider" and all(end for end, _ in ends):
        report.recipe["loss.options.both"] = True  # with both prompts, it trains at strengths 1 and −1
    if kind == "concept_slider":
        _map_option(report, "guidance", report.number("target.guidance_strength"), "target.guidance_strength")
    else:
        report.recipe["loss.options.guidance"] = 1.0  # it cannot be set there
        if report.text("target.target_class"):
            report.drop("target.target_class", "the shift is added to its prediction, not to that of no prompt.")
    return _finish(report, len(targets))


def _new_report(
    tool: str, config: Mapping[str, Any], defaults: Mapping[str, Any], entry: tuple[str, Mapping[str, Any]]
) -> ImportReport:
    """Return the report on a configuration with sections, and on one entry of its list of prompts."""
    sections = [*((name, value) for name, value in config.items() if isinstance(value, Mapping)), entry]
    values = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    values |= {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
    names = ("optimizer", "lr_scheduler", "precision", "dtype")
    lowered = {key: str(value).lower() for key, value in values.items() if key.rpartition(".")[2] in names and value}
    file_keys = {f"{entry[0]}.{key}": key for key in entry[1]}
    report = ImportReport(tool, values | lowered, defaults, file_keys, {key: values[key] for key in lowered})
    report.recipe |= {"task": "style", "trigger": "", "caption": "{caption}", "prior.weight": 0, "previews": False}
    report.recipe["loss.objective"] = "slider"
    return report


def _map_axis(report: ImportReport, target: tuple[str, str], ends: Sequence[tuple[str, str]]) -> None:
    """Map the target and the two ends of the axis, each a prompt and its key."""
    report.map("prompt", *target)
    for name, (prompt, key) in zip(("positive", "negative"), ends, strict=True):
        _map_option(report, name, prompt, key)


def _map_option(report: ImportReport, name: str, value: Any, key: str, remark: str = "") -> None:
    report.map(f"loss.options.{name}", value, key, remark=remark)


def _finish(report: ImportReport, entries: int) -> ImportReport:
    """Report what is left: further entries of the list of prompts, and unknown keys."""
    if entries > 1:
        report.drop_part("prompts", f"{entries} entries", "a slider has one axis: the first entry is used.")
    prefix = "loss.options."
    options = {key: report.recipe.pop(key) for key in [*report.recipe] if key.startswith(prefix)}
    report.recipe["loss.options"] = {key.removeprefix(prefix): value for key, value in options.items()}
    report.drop_unknown()
    return report
