"""Conversion of sd-scripts' arguments and data sets to a recipe: images, prompts, method, steps."""

import math
from pathlib import Path
from typing import Any

from diffgraft.imports.counting import Epochs
from diffgraft.imports.import_report import ImportReport, map_table
from diffgraft.imports.kohya_data import Data, from_arguments, from_dataset_config
from diffgraft.imports.kohya_flow import DEFAULTS as FLOW_DEFAULTS
from diffgraft.imports.kohya_flow import family_of, map_flow
from diffgraft.imports.kohya_keys import MAPPED, UNSUPPORTED
from diffgraft.imports.kohya_network import NETWORK, map_network
from diffgraft.imports.kohya_training import map_training
from diffgraft.imports.reading import find_file, read_config, read_text


def convert(report: ImportReport, config: Path, data_config: Path | None) -> None:
    """Fill the report's recipe from sd-scripts' arguments and its dataset_config.

    Args:
        report: a report that holds the arguments read from `config`; its recipe is filled in here.
        config: path of sd-scripts' configuration file; relative paths in it start from its folder.
        data_config: path of the dataset_config; by default the one that the arguments name.
    """
    flow = family_of(report)
    if flow:
        report.defaults = {**report.defaults, **FLOW_DEFAULTS}
    data = _data(report, config, data_config)
    kind = "network" if report.text("network_module") else "word" if report.text("token_string") else "full"
    report.recipe["task"] = "concept" if kind == "word" else "style"
    if kind == "word":
        for key in ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"):
            report.values.pop(key, None)  # sd-scripts ignores it in textual inversion
            report.unread.append(key)
    map_table(report, {**MAPPED, **UNSUPPORTED})
    _pictures(report, data)
    text_encoder = _method(report, kind)
    has_class = _prior(report, data, kind)
    _words(report, data, kind)
    _strip_noun(report.recipe)
    if (report.number("clip_skip") or 1) > 1:
        report.drop(
            "clip_skip", "the text encoder's last layer is used, in XL the last but one; this cannot be changed."
        )
    batch, accumulate = report.integer("train_batch_size") or 1, report.integer("gradient_accumulation_steps") or 1
    epochs = Epochs(data.pictures(config), batch, accumulate)
    _batch(report, epochs, has_class)
    _steps(report, epochs)
    map_training(report, kind, text_encoder)
    if flow:
        map_flow(report, flow, trains_text=bool(report.recipe.get("text_encoder")))
    _map_outputs(report, config, epochs)
    report.drop_unknown()


def _data(report: ImportReport, config: Path, data_config: Path | None) -> Data:
    named = report.text("dataset_config")
    data_config = data_config or find_file(named, config)
    if data_config is not None:
        return from_dataset_config(report, read_config(data_config), data_config)
    if named:
        report.drop("dataset_config", "the file was not found: give it on the command line as well.")
    return from_arguments(report, config)


def _pictures(report: ImportReport, data: Data) -> None:
    """Map the folders of images and their repeats."""
    for subset in data.subsets:
        if subset.metadata:
            why = "captions are read from .txt files or metadata.jsonl: write them there."
            key = report.file_key("in_json") if report.text("in_json") else "metadata_file"
            report.drop_part(key, subset.metadata, why)
        if subset.masks:
            why = "masks are read from beside their images: copy each there as NAME_mask.png."
            report.drop_part("conditioning_data_dir", subset.masks, why)
    instances = data.image_subsets
    if data.parent:
        report.map("images", data.parent, "train_data_dir")
    elif len(instances) == 1:
        report.map_part("images", instances[0].folder, "image_dir", instances[0].folder)
        report.map_part("repeats", instances[0].repeats, "num_repeats", instances[0].repeats)
    elif instances:
        concepts = [{"images": subset.folder, "repeats": subset.repeats} for subset in instances]
        report.map_part("concepts", concepts, "subsets", ", ".join(subset.folder for subset in instances))
    if (not instances and not data.parent) or any(not subset.folder for subset in instances):
        report.todo("images", "the folder with the images.")


def _words(report: ImportReport, data: Data, kind: str) -> None:
    """Map captions, prompts of images without captions, and the trigger."""
    extension = "caption_extention" if report.text("caption_extention") else "caption_extension"
    suffix = report.text(extension).lstrip(".")
    if suffix == "caption":
        report.drop(extension, ".txt files take precedence over .caption files: remove those that should not be read.")
    elif suffix != "txt":
        report.recipe["captions.use"] = False
        report.drop(
            extension,
            "captions are read from .txt and .caption files, so captions.use is set to false: rename the files and "
            "remove it.",
        )
    changed = report.flag("shuffle_caption") or bool(report.number("caption_tag_dropout_rate"))
    if changed and report.is_set("keep_tokens"):
        report.map("tags.keep", report.integer("keep_tokens"), "keep_tokens")
    if changed and report.is_set("keep_tokens_separator"):
        report.drop("keep_tokens_separator", "the tags to keep are a number: set tags.keep.")
    if kind == "word":
        _word(report, data)
    else:
        _prompts(report, data)


def _prompts(report: ImportReport, data: Data) -> None:
    prefix, suffix = report.text("caption_prefix"), report.text("caption_suffix")
    around = " ".join(part for part in (prefix, "{caption}", suffix) if part)
    instances = data.image_subsets
    trigger = (prefix or suffix).strip(" ,") or (instances[0].prompt if len(instances) == 1 else "")
    prompt = _prompt(instances[0].prompt if instances else "", around)
    report.recipe |= {"trigger": trigger, "caption": around, "prompt": prompt}
    if report.recipe["task"] == "subject":
        del report.recipe["caption"]
    for key in ("caption_prefix", "caption_suffix"):
        if report.text(key) and report.recipe["task"] == "subject":
            report.drop(key, "with a class noun, captions cannot be changed: change the .txt files.")
        elif report.text(key):
            report.map("caption", around, key, remark=f"captions that contain {trigger!r} are left unchanged")
    if len(instances) == 1 and instances[0].prompt and not data.parent:
        report.map_part("prompt", report.recipe["prompt"], "class_tokens", instances[0].prompt)
    for concept, subset in zip(report.recipe.get("concepts", []), instances, strict=False):
        concept["prompt"] = _prompt(subset.prompt, around)
        if not prefix and subset.prompt:
            concept["trigger"] = subset.prompt


def _prompt(text: str, around: str) -> str:
    return around.replace("{caption}", text).strip()


def _word(report: ImportReport, data: Data) -> None:
    """Map the prompts of textual inversion."""
    word = report.text("token_string")
    report.map("trigger", word, "token_string")
    template = next((kind for kind in ("object", "style") if report.flag(f"use_{kind}_template")), "none")
    report.recipe["templates"] = template
    if template != "none":
        report.map("templates", template, f"use_{template}_template", remark="instead of captions")
        report.recipe["captions.use"] = False
    elif len(data.image_subsets) == 1 and (prompt := data.image_subsets[0].prompt):
        report.recipe["prompt"] = prompt.replace(word, "{trigger}")
    for key in ("caption_prefix", "caption_suffix"):
        if report.text(key):
            report.drop(key, "captions cannot be changed in textual inversion: change the .txt files.")


def _method(report: ImportReport, kind: str) -> bool:
    """Map the method; return whether it may train the text encoder."""
    if kind == "network":
        _, text_encoder = map_network(report)
        map_table(report, NETWORK)
        return text_encoder
    if kind == "full":
        report.recipe["method"] = "full"
        return True
    report.recipe |= {"method": "textual-inversion", "options.keep_norm": False}  # as in sd-scripts
    report.map("options.vectors", report.integer("num_vectors_per_token"), "num_vectors_per_token")
    if report.text("init_word"):
        report.map("options.start", report.text("init_word"), "init_word")
    if report.text("weights"):
        report.map("init_from", report.text("weights"), "weights")
    return False


def _prior(report: ImportReport, data: Data, kind: str) -> bool:
    """Map class images; return whether there are any."""
    parent, subsets = data.class_parent, data.class_subsets
    if not parent and not subsets:
        if kind != "word":
            report.recipe["prior.weight"] = 0.0
        return False
    if kind == "word":
        report.drop_part(
            "reg_data_dir", parent or subsets[0].folder, "textual inversion does not change the class: not needed."
        )
        return True
    report.map("prior.weight", report.number("prior_loss_weight"), "prior_loss_weight")
    if parent:
        report.map("prior.folder", parent, "reg_data_dir")
        return True
    report.map_part("prior.folder", subsets[0].folder, "is_reg, image_dir", subsets[0].folder)
    if subsets[0].prompt:
        report.recipe |= {"task": "subject", "class_prompt": "{subject}"}
        report.map_part("subject", subsets[0].prompt, "is_reg, class_tokens", subsets[0].prompt)
    for subset in subsets[1:]:
        why = "there can be only one folder of class images: move these into it."
        report.drop_part("is_reg, image_dir", subset.folder, why)
    return True


def _strip_noun(recipe: dict[str, Any]) -> None:
    """Remove the class noun from the end of triggers: with the subject `dog`, `sks dog` becomes `sks`."""
    noun = recipe.get("subject")
    for settings in (recipe, *recipe.get("concepts", [])) if noun else ():
        if "trigger" in settings:
            settings["trigger"] = settings["trigger"].removesuffix(f" {noun}")


def _batch(report: ImportReport, epochs: Epochs, has_class: bool) -> None:
    """Map the batch size, which in sd-scripts includes class images and in a recipe does not."""
    batch, accumulate = epochs.batch, epochs.accumulate
    remark = "half of them are class images in sd-scripts, while a recipe's batch does not include these"
    if has_class and batch % 2 == 0:
        report.map("batch", batch // 2, "train_batch_size", remark=remark)
    else:
        report.map("batch", batch, "train_batch_size")
    if has_class and batch % 2 and accumulate % 2 == 0:
        report.map("accumulate", accumulate // 2, "gradient_accumulation_steps", remark=remark)
    else:
        report.map("accumulate", accumulate, "gradient_accumulation_steps")
    if has_class and batch % 2 and accumulate % 2:
        why = f"{remark}: each step trains on about twice as many of both; half the steps are enough."
        report.drop("train_batch_size", why)


def _steps(report: ImportReport, epochs: Epochs) -> None:
    count, gui_count = report.integer("max_train_epochs"), report.integer("gui_epoch")
    if not count and not gui_count:
        report.map("steps", report.integer("max_train_steps"), "max_train_steps")
        return
    key = "max_train_epochs" if count else "gui_epoch"
    steps = epochs.steps(count or gui_count or 1)
    if not count and gui_count and epochs.pictures:  # the GUI rounds once
        steps = math.ceil(epochs.pictures / epochs.batch / epochs.accumulate * gui_count)
    calculation = epochs.sum(count or gui_count or 1)
    if steps is None:
        report.todo("steps", f"{calculation}; the images cannot be counted, as their folder was not found.")
        report.drop(key, "a recipe counts optimizer steps, and the images cannot be counted: see below.")
    else:
        report.map("steps", steps, key, remark=calculation)


def _map_outputs(report: ImportReport, config: Path, epochs: Epochs) -> None:
    """Map saving, samples, validation and trackers."""
    _every(report, "adapter_every", "save_every_n_steps", "save_every_n_epochs", epochs)
    report.recipe["sample_every"] = 0
    _every(report, "sample_every", "sample_every_n_steps", "sample_every_n_epochs", epochs)
    if report.number("validation_split"):
        _every(report, "validation.every", "validate_every_n_steps", "validate_every_n_epochs", epochs)
    _samples(report, config)
    tracker = report.text("log_with") or ("tensorboard" if report.text("logging_dir") else "")
    if tracker:
        names = ["tensorboard", "wandb"] if tracker == "all" else [tracker]
        report.map("trackers", names, "log_with" if report.text("log_with") else "logging_dir")


def _every(report: ImportReport, recipe_key: str, steps_key: str, epochs_key: str, epochs: Epochs) -> None:
    """Map an interval in steps or epochs; epochs take precedence, as in sd-scripts."""
    if count := report.integer(epochs_key):
        steps = epochs.steps(count)
        if steps is None:
            report.drop(epochs_key, f"{recipe_key} counts steps, and the images cannot be counted: set it by hand.")
        else:
            report.map(recipe_key, steps, epochs_key, remark=epochs.sum(count))
    elif count := report.integer(steps_key):
        report.map(recipe_key, count, steps_key)


def _samples(report: ImportReport, config: Path) -> None:
    """Map the prompts of samples: lines of a file or, in the GUI's configurations, the text itself."""
    named = report.text("sample_prompts")
    if not named:
        return
    file = find_file(named, config) if "\n" not in named and len(named) < 1000 else None
    is_named = named.lower().endswith((".txt", ".toml", ".json"))
    if (file is None and is_named) or (file is not None and file.suffix.lower() != ".txt"):
        report.drop("sample_prompts", "this is not a .txt file that was found: list them under sample_prompts.")
        return
    text = read_text(file) if file is not None else named
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    prompts = [line.split(" --")[0].strip() for line in lines]
    if prompts:
        report.map("sample_prompts", prompts, "sample_prompts")
    if any(" --" in line for line in lines):
        report.drop("sample_prompts", "options after -- in the prompts (size, seed, guidance …) are dropped.")
