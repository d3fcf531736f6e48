"""Conversion of OneTrainer's configuration and concepts to a recipe: images, prompts, method, steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.counting import Epochs
from diffgraft.imports.import_report import ImportReport, as_number, map_table, short
from diffgraft.imports.onetrainer_concepts import Concepts, read_concepts
from diffgraft.imports.onetrainer_keys import APART, DEFAULTS, MAPPED, UNSUPPORTED
from diffgraft.imports.onetrainer_models import map_flow, model_of, read_transformer
from diffgraft.imports.onetrainer_training import in_steps, map_training
from diffgraft.imports.reading import find_file, read_config


def convert(config: Mapping[str, Any], file: Path, concepts: Sequence[Any] | None) -> ImportReport:
    """Convert a configuration of OneTrainer; return a report with the recipe.

    Args:
        config: content of the configuration's file.
        file: path of that file, relative to which other files are found.
        concepts: content of the file of concepts; by default the one that the configuration names.

    Raises:
        DiffgraftError: it is for a model family that recipes do not train, or trains a VAE.
    """
    report = _new_report(config)
    kind, model = _method_of(report), model_of(report)
    if model.is_flow:
        read_transformer(report, config.get("transformer"))
    report.recipe["task"] = "concept" if kind == "EMBEDDING" else "style"
    found = read_concepts(report, file, concepts)
    map_table(report, {**MAPPED, **UNSUPPORTED})
    batch, accumulate = report.integer("batch_size") or 1, report.integer("gradient_accumulation_steps") or 1
    epochs = Epochs(found.pictures, batch, accumulate)
    _map_steps(report, epochs)
    _method(report, kind)
    _words(report, found, kind)
    map_training(report, kind, model.encoders, epochs)
    if model.is_flow:
        map_flow(report, model)
    _map_outputs(report, file, epochs, found)
    report.drop_unknown()
    return report


_OLD = {
    "save_after": "save_every",
    "save_after_unit": "save_every_unit",
    "lora_layers": "layer_filter",
    "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex",
    "gradient_checkpointing": "unet.gradient_checkpointing",
    "min_snr_gamma": "loss_weight_strength",
}
"""Former name of a setting → current name"""
_REMOVED = (
    "weight_dtype",
    "enable_activation_offloading",
    "layer_offload_fraction",
    "enable_async_offloading",
    "__version",
)
"""Former settings that do not affect the result"""


def _new_report(config: Mapping[str, Any]) -> ImportReport:
    """Report with dotted keys for nested settings, and current names and meanings for those of older versions."""
    report = ImportReport("OneTrainer", {}, DEFAULTS)
    for key, value in config.items():
        if key in APART or key in _REMOVED:
            report.unread.append(key)
        elif isinstance(value, dict) and key not in ("concepts", "samples"):
            report.values |= {f"{key}.{inner}": v for inner, v in value.items() if inner != "__version"}
        elif key == "min_snr_gamma" and not value:
            report.unread.append(key)
        elif key in _OLD:
            report.values[_OLD[key]], report.file_keys[_OLD[key]] = value, key
        else:
            report.values[key] = value
    if config.get("min_snr_gamma"):
        report.values["loss_weight_fn"] = "MIN_SNR_GAMMA"
    if "gradient_checkpointing" in config:
        report.values["unet.gradient_checkpointing"] = config["gradient_checkpointing"] not in (False, "OFF")
    if 0 < (as_number("__version", config.get("__version")) or 0) < 4 and config.get("noising_weight"):
        report.values["timestep_distribution"] = "SIGMOID"
    return report


def _method_of(report: ImportReport) -> str:
    """Training method; raises DiffgraftError if it is not supported."""
    kind = report.text("training_method")
    if kind not in ("LORA", "FINE_TUNE", "EMBEDDING"):
        raise DiffgraftError(f"training_method={short(kind)} is not supported: only LORA, FINE_TUNE and EMBEDDING are.")
    return kind


def _map_steps(report: ImportReport, epochs: Epochs) -> None:
    count = report.number("epochs") or 1
    steps = epochs.steps(count)
    if steps is None:
        report.todo("steps", f"{epochs.sum(count)}; the images cannot be counted, as their folder was not found.")
        report.drop("epochs", "a recipe counts optimizer steps, and the images cannot be counted: see below.")
    else:
        report.map("steps", steps, "epochs", remark=f"about {epochs.sum(count)}")


def _method(report: ImportReport, kind: str) -> None:
    if kind == "FINE_TUNE":
        report.map("method", "full", "training_method")
    elif kind == "EMBEDDING":
        _embedding(report)
    else:
        _adapter(report)
    if report.text("lora_model_name") and kind == "LORA":
        report.map("init_from", report.text("lora_model_name"), "lora_model_name")


def _embedding(report: ImportReport) -> None:
    report.map("method", "textual-inversion", "training_method")
    report.map("trigger", report.text("embedding.placeholder"), "embedding.placeholder")
    report.map("options.vectors", report.integer("embedding.token_count") or 1, "embedding.token_count")
    report.map("options.start", report.text("embedding.initial_embedding_text"), "embedding.initial_embedding_text")
    report.map("options.keep_norm", report.flag("preserve_embedding_norm"), "preserve_embedding_norm")
    report.recipe["templates"] = "none"
    if report.text("embedding.model_name"):
        report.map("init_from", report.text("embedding.model_name"), "embedding.model_name")
    if report.flag("embedding.is_output_embedding"):
        report.drop("embedding.is_output_embedding", "not supported; the token's input embedding is trained.")


_PEFT = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_LAYERS = {"full": "all", "attn-mlp": "attention+feedforward", "attn-only": "attention"}
_FILTERS = {"": "", "attentions": "attn-mlp", "attn": "attn-only"}


def _adapter(report: ImportReport) -> None:
    peft = report.text("peft_type")
    method = _PEFT.get(peft, "lora")
    if peft in _PEFT:
        report.map("method", method, "peft_type")
    else:
        report.drop("peft_type", "not supported; replaced by method=lora.")
    preset = _FILTERS.get(report.text("layer_filter"), "custom") or report.text("layer_filter_preset")
    if preset in _LAYERS:
        report.map("layers", _LAYERS[preset], "layer_filter" if report.text("layer_filter") else "layer_filter_preset")
    else:
        report.drop(
            "layer_filter", "layers can be attention, attention+feedforward or all; lr_scale=0 excludes patterns."
        )
    if preset == "full":
        why = "layers=all does not adapt the first and last convolution and the time embeddings."
        report.drop("layer_filter_preset", why)
    report.map(
        "rank",
        report.integer("lokr_dim" if method == "lokr" else "lora_rank"),
        *(("lokr_dim",) if method == "lokr" else ("lora_rank",)),
    )
    report.map("alpha", report.number("lora_alpha"), "lora_alpha")
    if method == "lokr":
        report.map("options.factor", report.integer("lokr_decompose_factor"), "lokr_decompose_factor")
        for key, option in (
            ("decompose_both", "decompose_both"),
            ("full_matrix", "full_matrix"),
            ("use_tucker", "tucker"),
        ):
            if report.flag(f"lokr_{key}"):
                report.map(f"options.{option}", True, f"lokr_{key}")
        if report.flag("lokr_weight_decompose"):
            report.drop("lokr_weight_decompose", "only lora and locon support DoRA: options.dora.")
    if report.flag("lora_decompose") and method == "lora":
        report.map("options.dora", True, "lora_decompose")
        if not report.flag("lora_decompose_output_axis"):
            why = "OneTrainer learns a magnitude for each input of a layer, and options.dora for each output."
            report.drop("lora_decompose_output_axis", why)


def _words(report: ImportReport, found: Concepts, kind: str) -> None:
    """Map prompts and changes of captions."""
    prompts = [prompt for prompt in found.prompts if prompt is not None]
    if prompts and len(prompts) == len(found.prompts):
        report.recipe["captions.use"] = False
    if None in found.prompts:
        remark = "lines of a caption file are used in turn"
        report.map_part("captions.lines", "random", "concept text.prompt_source", "sample", remark)
    word = report.text("embedding.placeholder") if kind == "EMBEDDING" else ""

    def with_placeholder(prompt: str | None) -> str:
        return (prompt or "").replace(word, "{trigger}") if word else prompt or ""

    if kind != "EMBEDDING":
        report.recipe |= {"trigger": "", "caption": "{caption}", "prior.weight": 0.0, "prompt": ""}
    if len(found.prompts) == 1 and prompts:
        report.map_part("prompt", with_placeholder(prompts[0]), "concept text.prompt_path", prompts[0])
    for entry, prompt in zip(report.recipe.get("concepts", []), found.prompts, strict=False):
        if prompt is not None:
            entry["prompt"] = with_placeholder(prompt)
    shuffled, dropped = (report.flag(f"concepts.text.{key}") for key in ("enable_tag_shuffling", "tag_dropout_enable"))
    if shuffled or dropped:
        report.map("tags.keep", report.integer("concepts.text.keep_tags_count"), "concepts.text.keep_tags_count")
    if dropped and report.text("concepts.text.tag_dropout_mode") == "RANDOM":
        share = report.number("concepts.text.tag_dropout_probability")
        report.map("tags.drop", share, "concepts.text.tag_dropout_probability")
    elif dropped:
        why = "tags are dropped one by one with the same probability: set tags.drop or caption_dropout."
        report.drop("concepts.text.tag_dropout_mode", why)


def _map_outputs(report: ImportReport, file: Path, epochs: Epochs, found: Concepts) -> None:
    """Map the EMA, saving, samples, validation and trackers."""
    if report.text("ema") != "OFF":
        decay = max(0.0, report.number("ema_decay") or 0.0)
        every = max(1, report.integer("ema_update_step_interval") or 1)
        remark = f"{decay:g} every {every} steps" if every > 1 else ""
        report.map("ema", decay ** (1 / every), "ema_decay", remark=remark)
        report.map("ema", decay ** (1 / every), "ema")
    report.recipe["sample_every"] = 0
    for recipe_key, count, unit in (
        ("adapter_every", "save_every", "save_every_unit"),
        ("sample_every", "sample_after", "sample_after_unit"),
    ):
        if steps := in_steps(report, count, unit, epochs):
            report.map(recipe_key, steps, count)
    shares = [report.number(f"{encoder}.dropout_probability") for encoder in model_of(report).encoders]
    if any(shares) and len(set(shares)) == 1:
        report.map("caption_dropout", shares[0], "text_encoder.dropout_probability")
    elif any(shares):
        report.drop("text_encoder_2.dropout_probability", "captions are dropped for both text encoders at once.")
    if report.flag("validation") and found.held_out:
        report.map("validation.images", found.held_out[0], "validation")
        if steps := in_steps(report, "validate_after", "validate_after_unit", epochs):
            report.map("validation.every", steps, "validate_after")
    for folder in found.held_out[1 if report.flag("validation") else 0 :]:
        report.drop_part("concept of type VALIDATION", folder, "validation.images can be only one folder.")
    if report.flag("tensorboard"):
        report.map("trackers", ["tensorboard"], "tensorboard")
    _samples(report, file)


def _samples(report: ImportReport, file: Path) -> None:
    samples = report.get("samples")
    if samples is None and (path := find_file(report.text("sample_definition_file_name"), file)) is not None:
        samples = read_config(path)
    samples = [sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else []
    prompts = [str(sample["prompt"]) for sample in samples if sample.get("enabled", True) and sample.get("prompt")]
    if prompts:
        remark = "size, seed, steps and guidance are the base's defaults"
        report.map(
            "sample_prompts",
            prompts,
            "samples" if report.get("samples") else "sample_definition_file_name",
            remark=remark,
        )
