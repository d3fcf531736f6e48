"""From OneTrainer's configuration and concepts to a recipe: pictures, words, what is trained, steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffgraft.errors import DiffgraftError
from diffgraft.imports.account import Account, as_number, short, walk
from diffgraft.imports.counting import Epochs
from diffgraft.imports.onetrainer_concepts import Concepts, read_concepts
from diffgraft.imports.onetrainer_keys import APART, DEFAULTS, NOTHING, PLAIN
from diffgraft.imports.onetrainer_training import in_steps, take_training
from diffgraft.imports.reading import beside, read_config


def convert(said: Mapping[str, Any], file: Path, concepts: Sequence[Any] | None) -> Account:
    """A configuration of OneTrainer's, as an account with a recipe.

    Args:
        said: what the configuration's file holds.
        file: that file, beside which others are looked for.
        concepts: what the file of concepts holds; None: what the configuration names.

    Raises:
        DiffgraftError: it is for models that are none of Stable Diffusion 1.x, 2.x and XL, or trains a VAE.
    """
    account = _account(said)
    kind, is_xl = _check(account)
    account.recipe["task"] = "concept" if kind == "EMBEDDING" else "style"
    found = read_concepts(account, file, concepts)
    walk(account, {**PLAIN, **NOTHING})
    batch, accumulate = account.whole("batch_size") or 1, account.whole("gradient_accumulation_steps") or 1
    epochs = Epochs(found.pictures, batch, accumulate)
    _take_steps(account, epochs)
    _method(account, kind)
    _words(account, found, kind)
    take_training(account, kind, is_xl, epochs)
    _on_the_way(account, file, epochs, found)
    account.unknown()
    return account


_OLD = {
    "save_after": "save_every",
    "save_after_unit": "save_every_unit",
    "lora_layers": "layer_filter",
    "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex",
    "gradient_checkpointing": "unet.gradient_checkpointing",
    "min_snr_gamma": "loss_weight_strength",
}
"""What settings were called before → today's names"""
_GONE = (
    "weight_dtype",
    "enable_activation_offloading",
    "layer_offload_fraction",
    "enable_async_offloading",
    "__version",
)
"""What there was before, and changes nothing of what is learnt"""


def _account(said: Mapping[str, Any]) -> Account:
    """With the keys of groups laid out with dots, and today's names and meanings for what older versions had."""
    account = Account("OneTrainer", {}, DEFAULTS)
    for key, value in said.items():
        if key in APART or key in _GONE:
            account.idle.append(key)
        elif isinstance(value, dict) and key not in ("concepts", "samples"):
            account.given |= {f"{key}.{inner}": one for inner, one in value.items() if inner != "__version"}
        elif key == "min_snr_gamma" and not value:
            account.idle.append(key)
        elif key in _OLD:
            account.given[_OLD[key]], account.names[_OLD[key]] = value, key
        else:
            account.given[key] = value
    if said.get("min_snr_gamma"):
        account.given["loss_weight_fn"] = "MIN_SNR_GAMMA"
    if "gradient_checkpointing" in said:
        account.given["unet.gradient_checkpointing"] = said["gradient_checkpointing"] not in (False, "OFF")
    if 0 < (as_number("__version", said.get("__version")) or 0) < 4 and said.get("noising_weight"):
        account.given["timestep_distribution"] = "SIGMOID"
    return account


def _check(account: Account) -> tuple[str, bool]:
    """What kind of training it is, and whether of XL."""
    kind, model = account.text("training_method"), account.text("model_type")
    if not model.startswith("STABLE_DIFFUSION_") or model.startswith("STABLE_DIFFUSION_3") or "DEPTH" in model:
        raise DiffgraftError(
            f"model_type={short(model)} is another kind: here are Stable Diffusion 1.x, 2.x and XL alone."
        )
    if kind not in ("LORA", "FINE_TUNE", "EMBEDDING"):
        raise DiffgraftError(
            f"training_method={short(kind)} is nothing that is trained here: LORA, FINE_TUNE and EMBEDDING are."
        )
    return kind, "_XL_" in model


def _take_steps(account: Account, epochs: Epochs) -> None:
    count = account.number("epochs") or 1
    steps = epochs.steps(count)
    if steps is None:
        account.ask("steps", f"{epochs.sum(count)}; the pictures cannot be counted from here.")
        account.lose(
            "epochs", "it is optimiser steps that are set here, and the pictures cannot be counted: see below."
        )
    else:
        account.take("steps", steps, "epochs", remark=f"{epochs.sum(count)}, about")


def _method(account: Account, kind: str) -> None:
    if kind == "FINE_TUNE":
        account.take("method", "full", "training_method")
    elif kind == "EMBEDDING":
        _embedding(account)
    else:
        _adapter(account)
    if account.text("lora_model_name") and kind == "LORA":
        account.take("init_from", account.text("lora_model_name"), "lora_model_name")


def _embedding(account: Account) -> None:
    account.take("method", "textual-inversion", "training_method")
    account.take("trigger", account.text("embedding.placeholder"), "embedding.placeholder")
    account.take("options.vectors", account.whole("embedding.token_count") or 1, "embedding.token_count")
    account.take("options.start", account.text("embedding.initial_embedding_text"), "embedding.initial_embedding_text")
    account.take("options.keep_norm", account.flag("preserve_embedding_norm"), "preserve_embedding_norm")
    account.recipe["templates"] = "none"
    if account.text("embedding.model_name"):
        account.take("init_from", account.text("embedding.model_name"), "embedding.model_name")
    if account.flag("embedding.is_output_embedding"):
        account.lose("embedding.is_output_embedding", "a word is learnt where the text encoder reads it.")


_PEFT = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_LAYERS = {"full": "all", "attn-mlp": "attention+feedforward", "attn-only": "attention"}
_FILTERS = {"": "", "attentions": "attn-mlp", "attn": "attn-only"}


def _adapter(account: Account) -> None:
    peft = account.text("peft_type")
    method = _PEFT.get(peft, "lora")
    if peft in _PEFT:
        account.take("method", method, "peft_type")
    else:
        account.lose("peft_type", "nothing here trains it; lora is written in its place.")
    preset = _FILTERS.get(account.text("layer_filter"), "custom") or account.text("layer_filter_preset")
    if preset in _LAYERS:
        account.take(
            "layers", _LAYERS[preset], "layer_filter" if account.text("layer_filter") else "layer_filter_preset"
        )
    else:
        account.lose(
            "layer_filter", "layers are attention, attention+feedforward or all; rates of 0 leave out patterns."
        )
    if preset == "full":
        why = (
            "as there but for the first and last convolution and the embeddings of time, which layers=all leaves alone."
        )
        account.lose("layer_filter_preset", why)
    account.take(
        "rank",
        account.whole("lokr_dim" if method == "lokr" else "lora_rank"),
        *(("lokr_dim",) if method == "lokr" else ("lora_rank",)),
    )
    account.take("alpha", account.number("lora_alpha"), "lora_alpha")
    if method == "lokr":
        account.take("options.factor", account.whole("lokr_decompose_factor"), "lokr_decompose_factor")
        for key, ours in (
            ("decompose_both", "decompose_both"),
            ("full_matrix", "full_matrix"),
            ("use_tucker", "tucker"),
        ):
            if account.flag(f"lokr_{key}"):
                account.take(f"options.{ours}", True, f"lokr_{key}")
        if account.flag("lokr_weight_decompose"):
            account.lose(
                "lokr_weight_decompose", "lokr has no lengths of its own here; lora and locon have: options.dora."
            )
    if account.flag("lora_decompose") and method == "lora":
        account.take("options.dora", True, "lora_decompose")
        if not account.flag("lora_decompose_output_axis"):
            why = "each input of a layer has a length of its own there, and here each output."
            account.lose("lora_decompose_output_axis", why)


def _words(account: Account, found: Concepts, kind: str) -> None:
    """Prompts, and what is done to captions."""
    prompts = [prompt for prompt in found.prompts if prompt is not None]
    if prompts and len(prompts) == len(found.prompts):
        account.recipe["captions.use"] = False
    if None in found.prompts:
        remark = "of a file of several lines each comes in turn"
        account.take_part("captions.lines", "random", "concept text.prompt_source", "sample", remark)
    word = account.text("embedding.placeholder") if kind == "EMBEDDING" else ""

    def ours(prompt: str | None) -> str:
        return (prompt or "").replace(word, "{trigger}") if word else prompt or ""

    if kind != "EMBEDDING":
        account.recipe |= {"trigger": "", "caption": "{caption}", "prior.weight": 0.0, "prompt": ""}
    if len(found.prompts) == 1 and prompts:
        account.take_part("prompt", ours(prompts[0]), "concept text.prompt_path", prompts[0])
    for entry, prompt in zip(account.recipe.get("concepts", []), found.prompts, strict=False):
        if prompt is not None:
            entry["prompt"] = ours(prompt)
    shuffled, dropped = (account.flag(f"concepts.text.{key}") for key in ("enable_tag_shuffling", "tag_dropout_enable"))
    if shuffled or dropped:
        account.take("tags.keep", account.whole("concepts.text.keep_tags_count"), "concepts.text.keep_tags_count")
    if dropped and account.text("concepts.text.tag_dropout_mode") == "RANDOM":
        share = account.number("concepts.text.tag_dropout_probability")
        account.take("tags.drop", share, "concepts.text.tag_dropout_probability")
    elif dropped:
        why = "tags are left out one by one here, all with the same probability: tags.drop, or caption_dropout for all."
        account.lose("concepts.text.tag_dropout_mode", why)


def _on_the_way(account: Account, file: Path, epochs: Epochs, found: Concepts) -> None:
    """The average, what is saved, drawn, held out and followed."""
    if account.text("ema") != "OFF":
        decay = max(0.0, account.number("ema_decay") or 0.0)
        every = max(1, account.whole("ema_update_step_interval") or 1)
        remark = f"{decay:g} every {every} steps" if every > 1 else ""
        account.take("ema", decay ** (1 / every), "ema_decay", remark=remark)
        account.take("ema", decay ** (1 / every), "ema")
    account.recipe["sample_every"] = 0
    for ours, count, unit in (
        ("adapter_every", "save_every", "save_every_unit"),
        ("sample_every", "sample_after", "sample_after_unit"),
    ):
        if steps := in_steps(account, count, unit, epochs):
            account.take(ours, steps, count)
    words = ("dropout_probability", *(("dropout_probability",) if "_XL_" in account.text("model_type") else ()))
    shares = [account.number(f"text_encoder{'_2' if row else ''}.{word}") for row, word in enumerate(words)]
    if any(shares) and len(set(shares)) == 1:
        account.take("caption_dropout", shares[0], "text_encoder.dropout_probability")
    elif any(shares):
        account.lose("text_encoder_2.dropout_probability", "captions are left out for both text encoders at once here.")
    if account.flag("validation") and found.held_out:
        account.take("validation.images", found.held_out[0], "validation")
        if steps := in_steps(account, "validate_after", "validate_after_unit", epochs):
            account.take("validation.every", steps, "validate_after")
    for folder in found.held_out[1 if account.flag("validation") else 0 :]:
        account.aside("concept of type VALIDATION", folder, "one folder is held out, by validation.images.")
    if account.flag("tensorboard"):
        account.take("trackers", ["tensorboard"], "tensorboard")
    _samples(account, file)


def _samples(account: Account, file: Path) -> None:
    said = account.get("samples")
    if said is None and (path := beside(account.text("sample_definition_file_name"), file)) is not None:
        said = read_config(path)
    listed = [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []
    prompts = [str(one["prompt"]) for one in listed if one.get("enabled", True) and one.get("prompt")]
    if prompts:
        remark = "size, seed, steps and guidance of samples are the base's own here"
        account.take(
            "sample_prompts",
            prompts,
            "samples" if account.get("samples") else "sample_definition_file_name",
            remark=remark,
        )
