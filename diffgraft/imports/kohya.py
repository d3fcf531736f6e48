"""From sd-scripts' arguments and data sets to a recipe: pictures, words, what is trained, steps."""

import math
from pathlib import Path
from typing import Any

from diffgraft.imports.account import Account, walk
from diffgraft.imports.counting import Epochs
from diffgraft.imports.kohya_data import Data, from_arguments, from_dataset_config
from diffgraft.imports.kohya_keys import NOTHING, PLAIN
from diffgraft.imports.kohya_network import NETWORK, take_network
from diffgraft.imports.kohya_training import take_training
from diffgraft.imports.reading import beside, read_config, read_text


def convert(account: Account, config: Path, data_config: Path | None) -> None:
    """Make a recipe of sd-scripts' arguments, and its dataset_config.

    Args:
        account: with the arguments that the file gives.
        config: the file, beside which others are looked for.
        data_config: the dataset_config; None: what the arguments name.
    """
    data = _data(account, config, data_config)
    kind = "network" if account.text("network_module") else "word" if account.text("token_string") else "full"
    account.recipe["task"] = "concept" if kind == "word" else "style"
    if kind == "word":
        for key in ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"):
            account.given.pop(key, None)  # which textual inversion does not have there
            account.idle.append(key)
    walk(account, {**PLAIN, **NOTHING})
    _pictures(account, data)
    text_encoder = _method(account, kind)
    has_class = _prior(account, data, kind)
    _words(account, data, kind)
    _apart(account.recipe)
    if (account.number("clip_skip") or 1) > 1:
        account.lose("clip_skip", "the text encoder's last layer is read here, in XL the last but one, and no other.")
    batch, accumulate = account.whole("train_batch_size") or 1, account.whole("gradient_accumulation_steps") or 1
    epochs = Epochs(data.pictures(config), batch, accumulate)
    _batch(account, epochs, has_class)
    _steps(account, epochs)
    take_training(account, kind, text_encoder)
    _on_the_way(account, config, epochs)
    account.unknown()


def _data(account: Account, config: Path, data_config: Path | None) -> Data:
    named = account.text("dataset_config")
    data_config = data_config or beside(named, config)
    if data_config is not None:
        return from_dataset_config(account, read_config(data_config), data_config)
    if named:
        account.lose("dataset_config", "there is no such file, from here or beside the configuration: give it as well.")
    return from_arguments(account, config)


def _pictures(account: Account, data: Data) -> None:
    """Where the pictures are, and how often they come."""
    for one in data.subsets:
        if one.metadata:
            why = "captions are read from .txt files or metadata.jsonl here: write them there."
            account.aside(account.name("in_json") if account.text("in_json") else "metadata_file", one.metadata, why)
        if one.masks:
            why = "masks lie beside their pictures here: copy each there as NAME_mask.png."
            account.aside("conditioning_data_dir", one.masks, why)
    own = data.instance
    if data.parent:
        account.take("images", data.parent, "train_data_dir")
    elif len(own) == 1:
        account.take_part("images", own[0].folder, "image_dir", own[0].folder)
        account.take_part("repeats", own[0].repeats, "num_repeats", own[0].repeats)
    elif own:
        concepts = [{"images": one.folder, "repeats": one.repeats} for one in own]
        account.take_part("concepts", concepts, "subsets", ", ".join(one.folder for one in own))
    if (not own and not data.parent) or any(not one.folder for one in own):
        account.ask("images", "the folder with the pictures.")


def _words(account: Account, data: Data, kind: str) -> None:
    """Captions, the prompts of pictures without, and the word that calls what is learnt."""
    extension = "caption_extention" if account.text("caption_extention") else "caption_extension"
    suffix = account.text(extension).lstrip(".")
    if suffix == "caption":
        account.lose(extension, ".caption files are read here, and .txt files before them: remove those not meant.")
    elif suffix != "txt":
        account.recipe["captions.use"] = False
        account.lose(
            extension,
            "captions are read from .txt and .caption files, so captions.use=false is written: rename the files and "
            "leave it out.",
        )
    changed = account.flag("shuffle_caption") or bool(account.number("caption_tag_dropout_rate"))
    if changed and account.has("keep_tokens"):
        account.take("tags.keep", account.whole("keep_tokens"), "keep_tokens")
    if changed and account.has("keep_tokens_separator"):
        account.lose("keep_tokens_separator", "what stays in front is a number of tags here: set tags.keep.")
    if kind == "word":
        _word(account, data)
    else:
        _prompts(account, data)


def _prompts(account: Account, data: Data) -> None:
    prefix, suffix = account.text("caption_prefix"), account.text("caption_suffix")
    around = " ".join(part for part in (prefix, "{caption}", suffix) if part)
    own = data.instance
    trigger = (prefix or suffix).strip(" ,") or (own[0].says if len(own) == 1 else "")
    account.recipe |= {"trigger": trigger, "caption": around, "prompt": _prompt(own[0].says if own else "", around)}
    if account.recipe["task"] == "subject":
        del account.recipe["caption"]
    for key in ("caption_prefix", "caption_suffix"):
        if account.text(key) and account.recipe["task"] == "subject":
            account.lose(key, "with class images of one noun, captions stay as they are: change the .txt files.")
        elif account.text(key):
            account.take("caption", around, key, remark=f"captions that hold {trigger!r} stay as they are")
    if len(own) == 1 and own[0].says and not data.parent:
        account.take_part("prompt", account.recipe["prompt"], "class_tokens", own[0].says)
    for concept, one in zip(account.recipe.get("concepts", []), own, strict=False):
        concept["prompt"] = _prompt(one.says, around)
        if not prefix and one.says:
            concept["trigger"] = one.says


def _prompt(says: str, around: str) -> str:
    return around.replace("{caption}", says).strip()


def _word(account: Account, data: Data) -> None:
    """Textual inversion."""
    word = account.text("token_string")
    account.take("trigger", word, "token_string")
    template = next((kind for kind in ("object", "style") if account.flag(f"use_{kind}_template")), "none")
    account.recipe["templates"] = template
    if template != "none":
        account.take("templates", template, f"use_{template}_template", remark="in the place of captions")
        account.recipe["captions.use"] = False
    elif len(data.instance) == 1 and (says := data.instance[0].says):
        account.recipe["prompt"] = says.replace(word, "{trigger}")
    for key in ("caption_prefix", "caption_suffix"):
        if account.text(key):
            account.lose(key, "a word is learnt from captions as they are: change the .txt files.")


def _method(account: Account, kind: str) -> bool:
    """What is trained; returns whether the text encoder may be."""
    if kind == "network":
        _, text_encoder = take_network(account)
        walk(account, NETWORK)
        return text_encoder
    if kind == "full":
        account.recipe["method"] = "full"
        return True
    account.recipe |= {"method": "textual-inversion", "options.keep_norm": False}  # as there
    account.take("options.vectors", account.whole("num_vectors_per_token"), "num_vectors_per_token")
    if account.text("init_word"):
        account.take("options.start", account.text("init_word"), "init_word")
    if account.text("weights"):
        account.take("init_from", account.text("weights"), "weights")
    return False


def _prior(account: Account, data: Data, kind: str) -> bool:
    """Class images; returns whether there are any."""
    parent, own = data.class_parent, data.of_class
    if not parent and not own:
        if kind != "word":
            account.recipe["prior.weight"] = 0.0
        return False
    if kind == "word":
        account.aside(
            "reg_data_dir", parent or own[0].folder, "a word changes nothing of the class: it needs none here."
        )
        return True
    account.take("prior.weight", account.number("prior_loss_weight"), "prior_loss_weight")
    if parent:
        account.take("prior.folder", parent, "reg_data_dir")
        return True
    account.take_part("prior.folder", own[0].folder, "is_reg, image_dir", own[0].folder)
    if own[0].says:
        account.recipe |= {"task": "subject", "class_prompt": "{subject}"}
        account.take_part("subject", own[0].says, "is_reg, class_tokens", own[0].says)
    for one in own[1:]:
        account.aside("is_reg, image_dir", one.folder, "there is one folder of class images: put these into it, too.")
    return True


def _apart(recipe: dict[str, Any]) -> None:
    """Take the class's noun from the end of triggers: "sks dog" is sks, and a dog."""
    noun = recipe.get("subject")
    for said in (recipe, *recipe.get("concepts", [])) if noun else ():
        if "trigger" in said:
            said["trigger"] = said["trigger"].removesuffix(f" {noun}")


def _batch(account: Account, epochs: Epochs, has_class: bool) -> None:
    """Pictures in a step; class images come on top here, and are among them there."""
    batch, accumulate = epochs.batch, epochs.accumulate
    remark = "half of them are class images there, and here those come on top"
    if has_class and batch % 2 == 0:
        account.take("batch", batch // 2, "train_batch_size", remark=remark)
    else:
        account.take("batch", batch, "train_batch_size")
    if has_class and batch % 2 and accumulate % 2 == 0:
        account.take("accumulate", accumulate // 2, "gradient_accumulation_steps", remark=remark)
    else:
        account.take("accumulate", accumulate, "gradient_accumulation_steps")
    if has_class and batch % 2 and accumulate % 2:
        why = f"{remark}: each step here learns from about twice as many of both; half the steps show them as often."
        account.lose("train_batch_size", why)


def _steps(account: Account, epochs: Epochs) -> None:
    count, at_once = account.whole("max_train_epochs"), account.whole("gui_epoch")
    if not count and not at_once:
        account.take("steps", account.whole("max_train_steps"), "max_train_steps")
        return
    key = "max_train_epochs" if count else "gui_epoch"
    steps = epochs.steps(count or at_once or 1)
    if not count and at_once and epochs.pictures:  # the GUI rounds once
        steps = math.ceil(epochs.pictures / epochs.batch / epochs.accumulate * at_once)
    said = epochs.sum(count or at_once or 1)
    if steps is None:
        account.ask("steps", f"{said}; the pictures cannot be counted from here.")
        account.lose(key, "it is optimiser steps that are set here, and the pictures cannot be counted: see below.")
    else:
        account.take("steps", steps, key, remark=said)


def _on_the_way(account: Account, config: Path, epochs: Epochs) -> None:
    """What is saved, drawn, held out and followed."""
    _every(account, "adapter_every", "save_every_n_steps", "save_every_n_epochs", epochs)
    account.recipe["sample_every"] = 0
    _every(account, "sample_every", "sample_every_n_steps", "sample_every_n_epochs", epochs)
    if account.number("validation_split"):
        _every(account, "validation.every", "validate_every_n_steps", "validate_every_n_epochs", epochs)
    _samples(account, config)
    followed = account.text("log_with") or ("tensorboard" if account.text("logging_dir") else "")
    if followed:
        names = ["tensorboard", "wandb"] if followed == "all" else [followed]
        account.take("trackers", names, "log_with" if account.text("log_with") else "logging_dir")


def _every(account: Account, ours: str, steps_key: str, epochs_key: str, epochs: Epochs) -> None:
    """Steps between one time and the next; epochs go before steps, as there."""
    if count := account.whole(epochs_key):
        steps = epochs.steps(count)
        if steps is None:
            account.lose(epochs_key, f"it is {ours}, in steps, and the pictures cannot be counted from here.")
        else:
            account.take(ours, steps, epochs_key, remark=epochs.sum(count))
    elif count := account.whole(steps_key):
        account.take(ours, count, steps_key)


def _samples(account: Account, config: Path) -> None:
    """Prompts of samples: of a file that is named, or, in the GUI's files, the text itself."""
    named = account.text("sample_prompts")
    if not named:
        return
    file = beside(named, config) if "\n" not in named and len(named) < 1000 else None
    is_named = named.lower().endswith((".txt", ".toml", ".json"))
    if (file is None and is_named) or (file is not None and file.suffix.lower() != ".txt"):
        account.lose("sample_prompts", "it is no .txt file that can be read from here: list them under sample_prompts.")
        return
    text = read_text(file) if file is not None else named
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    prompts = [line.split(" --")[0].strip() for line in lines]
    if prompts:
        account.take("sample_prompts", prompts, "sample_prompts")
    if any(" --" in line for line in lines):
        account.lose("sample_prompts", "what follows -- in them (size, seed, guidance …) is left away.")
