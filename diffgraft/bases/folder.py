"""Loading a base from a diffusers folder, which is not trusted.

A folder may come from anyone. Its index may only name certain classes of two libraries, and code in the folder is never
run. Networks are created on the device ``meta``, compared with the headers of the weight files, and only then filled,
so that every weight is there, in the right shape, and none is left over.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from diffgraft.bases.configs import (
    AlphaVAEConfig,
    BertConfig,
    ClipConfig,
    ConditionerConfig,
    Config,
    CosmosConfig,
    FlowSchedulerConfig,
    FlowVAEConfig,
    SchedulerConfig,
    TransformerConfig,
    UNetConfig,
    VAEConfig,
    VideoVAEConfig,
    read_object,
    short,
    validated,
    validated_language_model,
)
from diffgraft.bases.family import Component
from diffgraft.bases.folder_weights import fill
from diffgraft.bases.modular import INDEXES, MODULAR_INDEX, pipeline_of
from diffgraft.bases.processors import read_processor, tokenizer_in
from diffgraft.bases.registry import conditioner_tokenizers, denoisers, part_names, tokenizers
from diffgraft.bases.unet import inpainting_class
from diffgraft.bases.vocabulary import check_vocabulary
from diffgraft.errors import DiffgraftError

WeightsFrom = Literal["files", "headers", "nowhere"]
"""Whether weights are read from files, only compared with the files' headers, or neither"""

_CLIP = Path(__file__).parent / "tiny" / "model" / "tokenizer"
"""CLIP's own tokenizer, which the embedded base uses"""
_CONFIGS: Mapping[str, type[Config]] = {
    "UNet2DConditionModel": UNetConfig,
    "AutoencoderKL": VAEConfig,
    "AutoencoderKLFlux2": FlowVAEConfig,
    "AutoencoderKLQwenImage": VideoVAEConfig,
    "AutoencoderKLQwenImage21": AlphaVAEConfig,
    "AnimaTextConditioner": ConditionerConfig,
    "CosmosTransformer3DModel": CosmosConfig,
}
"""Class of a network → known fields of its configuration; all others are transformers"""
Components = Mapping[str, Component]
"""Component of a pipeline → what it may be"""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "guider", "image_processor")
"""Parts that the index may list, but that are never loaded"""


def read_index(folder: Path, pipelines: Mapping[str, Components]) -> dict[str, tuple[str, str]]:
    """Read the index of a diffusers folder and return part → library and class; ``""`` stands for the pipeline.

    Args:
        folder: a diffusers folder.
        pipelines: class name of a known pipeline → its components.

    Raises:
        DiffgraftError: the index is missing or damaged, lacks a part, or names an unknown class.
    """
    path = next((path for name in INDEXES if (path := folder / name).is_file()), None)
    if path is None:
        raise DiffgraftError(
            f"{folder} is not a diffusers folder: it has no {INDEXES[0]}. Give the folder that "
            "`save_pretrained` wrote, a single .safetensors checkpoint, a hub id, or `tiny`."
        )
    index = read_object(path)
    kind = index.get("_class_name", "model without a class")
    known = {name: parts for plain, parts in pipelines.items() for name in (plain, inpainting_class(plain))}
    if not isinstance(kind, str) or kind not in known:
        named = kind if isinstance(kind, str) and len(kind) < 60 else short(kind)
        raise DiffgraftError(
            f"{folder} holds a {named}, which is not supported; supported are: {', '.join(sorted(pipelines))}."
        )
    components = known[kind]
    classes_of: dict[str, tuple[str, str]] = {"": ("diffusers", kind)}
    for name, entry in index.items():
        if entry == [None, None] and (name not in components or not components[name].required):
            continue
        if name in components:
            library, classes, _ = components[name]
            # in a modular index a third value tells from where diffusers would load the part; it is not followed
            length = 3 if path.name == MODULAR_INDEX else 2
            if not isinstance(entry, list) or len(entry) != length or entry[0] != library or entry[1] not in classes:
                raise DiffgraftError(
                    f"{path} has {short(entry)} as its {name}; supported classes of {library}: {', '.join(classes)}."
                )
            classes_of[name] = (library, entry[1])
        elif isinstance(entry, list | dict) and name not in _LEFT_OUT and not _is_setting(entry):
            raise DiffgraftError(f"{path} lists a part {short(name)}, which a {kind} does not have: remove it.")
    needed = {name for name, component in components.items() if component.required}
    for name in sorted(needed - set(classes_of)):
        raise DiffgraftError(f"{path} lists no {name}, which a {kind} needs: copy the model's folder again.")
    return classes_of


def _is_setting(entry: list[Any] | dict[str, Any]) -> bool:
    """Whether an entry of an index is a list of numbers, a setting of the pipeline, and not a part."""
    return isinstance(entry, list) and all(type(value) in (int, float) for value in entry)


def build_pipeline(
    folder: Path,
    pipelines: Mapping[str, Components],
    weights: WeightsFrom,
    loaded: Mapping[str, Any] | None = None,
) -> Any:
    """Build the diffusers pipeline of a folder; its networks are on ``meta`` unless their weights are read.

    Weights get the dtype of most numbers in their files; the base's hash is computed from them.

    Args:
        folder: a diffusers folder.
        pipelines: class name of a known pipeline → its components.
        weights: whether weights are read from files.
        loaded: loaded parts by name, used instead of those in the folder.

    Raises:
        DiffgraftError: a part of the folder is unknown, damaged or missing.
    """
    index = read_index(folder, pipelines)
    parts: dict[str, Any] = {**(loaded or {})}
    networks = (*denoisers(), "vae", *part_names(), *conditioner_tokenizers())
    for name in sorted(index, key=lambda name: "tokenizer" in name):  # tokenizers last, as they take longest
        library, kind = index[name]
        if name in parts:
            continue
        _check_is_there(folder, name)
        if name in networks:
            parts[name] = empty_network(folder / name, library, kind, has_flow="transformer" in index)
            if weights != "nowhere":
                fill(parts[name], folder / name, name, is_read=weights == "files")
            parts[name].eval()
        elif name == "scheduler":
            parts[name] = _scheduler(folder / name, kind)
        elif name == "processor":
            parts[name] = read_processor(folder / name, _tokenizer(folder / name, "Qwen2Tokenizer"))
        elif name:
            parts[name] = _tokenizer(folder / name, kind)
    _check_fit(folder, parts)
    options: dict[str, Any] = {name: None for name in pipelines.get(index[""][1], {}) if name not in parts}
    if "unet" in parts and "text_encoder_2" not in parts:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _library_errors(folder, "the parts do not make a pipeline"):
        return pipeline_of(index[""][1], {**parts, **options})


def _check_is_there(folder: Path, name: str) -> None:
    """Raise DiffgraftError if a modular folder lacks a part, and say from where diffusers would load it."""
    if name and not (folder / name).is_dir() and (folder / MODULAR_INDEX).is_file():
        _, _, place = read_object(folder / MODULAR_INDEX)[name]
        source = place.get("pretrained_model_name_or_path") if isinstance(place, dict) else None
        raise DiffgraftError(
            f"{folder / name} is missing. The index of the folder has it from {short(source)}, and only parts in the "
            "folder itself are read: download that one, and put the part there."
        )


@contextmanager
def _library_errors(path: Path, problem: str) -> Iterator[None]:
    """Raise exceptions of libraries within the block as DiffgraftError with the path and the `problem`."""
    try:
        yield
    except (DiffgraftError, MemoryError):
        raise
    except BaseException as error:
        # the PanicException of Rust code in tokenizers is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if len(lines[0]) < 200 else f"{lines[0][:200]}…"
        raise DiffgraftError(f"{path} cannot be used, as {problem}: {reason.rstrip('.:')}.") from error


def empty_network(folder: Path, library: str, kind: str, *, has_flow: bool = False) -> Any:
    """Create a network from the configuration in `folder`; its parameters are on the device ``meta``."""
    import transformers

    path = folder / "config.json"
    config = read_object(path)
    if library == "diffusers":
        return network_of(path, kind, config, has_flow=has_flow)
    model: Any = getattr(transformers, kind)
    if not kind.startswith(("CLIP", "Bert")):
        values = validated_language_model(path, config, model.config_class)
        with _library_errors(path, f"no {kind} can be built from it"), _without_weights(has_flow):
            return model(model.config_class(**values))
    if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    values = validated(path, config, BertConfig if kind == "BertModel" else ClipConfig)
    with _library_errors(path, f"no {kind} can be built from it"), torch.device("meta"):
        if values["hidden_size"] % values["num_attention_heads"]:
            raise ValueError("hidden_size is not a multiple of num_attention_heads")
        return model(model.config_class(**values))


def network_of(path: Path, kind: str, config: Mapping[str, Any], *, has_flow: bool) -> Any:
    """Create a network of diffusers without weights.

    Args:
        path: file that the configuration is of, for messages.
        kind: class of the network.
        config: its configuration, which is not trusted.
        has_flow: whether it is a part of a flow-matching base.

    Raises:
        DiffgraftError: no such network can be built.
    """
    import diffusers

    model: Any = getattr(diffusers, kind)
    values = validated(path, config, _config_of(kind, has_flow=has_flow), model)
    with _library_errors(path, f"no {kind} can be built from it"), _without_weights(has_flow):
        return model.from_config(values)


def _config_of(kind: str, *, has_flow: bool) -> type[Config]:
    """Return the known fields of the configuration of a class of diffusers."""
    if kind == "AutoencoderKL" and has_flow:
        return FlowVAEConfig
    return _CONFIGS.get(kind, TransformerConfig)


@contextmanager
def _without_weights(has_flow: bool) -> Iterator[None]:
    """Create networks without weights within the block, on the device ``meta``.

    Tensors that are no parameters, such as tables of positions, are in no file. Networks of flow-matching bases have
    them computed; those of other bases are known, and filled in with the weights.
    """
    if not has_flow:
        with torch.device("meta"):
            yield
        return
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def _scheduler(folder: Path, kind: str) -> Any:
    import diffusers

    model: Any = getattr(diffusers, kind)
    path = folder / "scheduler_config.json"
    if kind == "FlowMatchEulerDiscreteScheduler":
        values = validated(path, read_object(path), FlowSchedulerConfig, model)
        with _library_errors(path, f"no {kind} can be built from it"):
            return model.from_config(values)
    values = validated(path, read_object(path), SchedulerConfig, model)
    if values.get("trained_betas") is not None and len(values["trained_betas"]) != values.get(
        "num_train_timesteps", 1000
    ):
        raise DiffgraftError(f"{path} has {len(values['trained_betas'])} trained_betas; each timestep needs one.")
    with _library_errors(path, f"no {kind} can be built from it"):
        scheduler = model.from_config(values)
        alphas = scheduler.alphas_cumprod.double()
        is_valid = alphas.isfinite().all() and (alphas >= 0).all() and (alphas <= 1).all()
        if not (is_valid and (alphas.diff() <= 0).all()):
            raise ValueError("its noise does not increase with the timestep")
        return scheduler


def _tokenizer(folder: Path, kind: str) -> Any:
    import transformers

    if not folder.is_dir() or (not any(folder.glob("*.json")) and not any(folder.glob("*.txt"))):
        raise DiffgraftError(f"{folder} is missing, or has no vocabulary: copy the model's folder again.")
    config = folder / "tokenizer_config.json"
    if config.exists():
        read_object(config)
    with _library_errors(folder, f"no {kind} can be made of it"):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_tokenizers(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raise DiffgraftError if a tokenizer returns no tokens, or some that its text encoder does not have."""
    for name, place in {**tokenizers(), **conditioner_tokenizers()}.items():
        if parts.get(name) is None:
            continue
        with _library_errors(folder / place, "the tokenizer is damaged"):
            tokenizer, config = tokenizer_in(SimpleNamespace(**parts), place), parts[name].config
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            size = getattr(config, "target_vocab_size", None) or config.vocab_size
            longest = tokenizer.model_max_length
            if type(tokenizer).__name__.startswith("CLIP") and longest > config.max_position_embeddings:
                raise ValueError(
                    f"it returns {longest} tokens, but the text encoder has {config.max_position_embeddings} positions"
                )
            if not isinstance(longest, int) or tokenizer.pad_token_id is None:
                raise ValueError("it has no number as model_max_length, or no token for padding")
            if not 0 <= max(tokenizer("a photo").input_ids, default=size) < size:
                raise ValueError(f"it returns no tokens, or tokens beyond the {size} of the text encoder")


def _check_fit(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raise DiffgraftError if the parts of a folder do not belong together."""
    if "unet" not in parts:
        _check_tokenizers(folder, parts)
        return
    unet, vae = parts["unet"].config, parts["vae"].config
    encoders = {name: part.config for name, part in parts.items() if name.startswith("text_encoder")}
    width = sum(config.hidden_size for config in encoders.values())
    reason = ""
    if unet.out_channels != vae.latent_channels or unet.in_channels < vae.latent_channels:
        reason = (
            f"its UNet takes {unet.in_channels} channels and returns {unet.out_channels}, but its VAE has "
            f"{vae.latent_channels}"
        )
    elif width != unet.cross_attention_dim:
        reason = f"its UNet takes text of width {unet.cross_attention_dim}, but its text encoders return {width}"
    elif ("text_encoder_2" in parts) != (unet.addition_embed_type is not None):
        reason = f"its UNet has addition_embed_type={unet.addition_embed_type!r}"
    for name, config in encoders.items():
        tokenizer = parts[name.replace("text_encoder", "tokenizer")]
        with _library_errors(folder / name.replace("text_encoder", "tokenizer"), "the tokenizer is damaged"):
            if type(tokenizer).__name__.startswith("CLIP"):
                check_vocabulary(tokenizer, config.vocab_size, _CLIP)
            first, last = [*tokenizer("").input_ids, None, None][:2]
            ids = tokenizer("a photo").input_ids
            if None in (first, last, tokenizer.pad_token_id) or len(ids) < 3:
                reason = (
                    reason or f"the tokenizer of its {name} returns no tokens, or lacks start, end or padding tokens"
                )
            elif max(*ids, tokenizer.pad_token_id, len(tokenizer) - 1) >= config.vocab_size:
                reason = reason or f"the tokenizer of its {name} has more tokens than the text encoder's table"
            elif not 3 <= tokenizer.model_max_length <= config.max_position_embeddings:
                reason = reason or (
                    f"the tokenizer of its {name} returns {tokenizer.model_max_length} tokens, but the encoder has "
                    f"{config.max_position_embeddings} positions"
                )
    if reason:
        raise DiffgraftError(f"{folder} is not a working base: {reason}; copy the model's folder again.")
