"""Loading a base from a diffusers folder, which is not trusted.

A folder may come from anyone. Its index may only name certain classes of two libraries, and code in the folder is never
run. Networks are created on the device ``meta``, compared with the headers of the weight files, and only then filled,
so that every weight is there, in the right shape, and none is left over.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffgraft.bases.checkpoint_files import FLOAT_DTYPES, files_of_part
from diffgraft.bases.configs import (
    BertConfig,
    ClipConfig,
    Config,
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
from diffgraft.bases.registry import denoisers
from diffgraft.bases.unet import inpainting
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
}
"""Class of a network → known fields of its configuration; all others are transformers"""
Components = Mapping[str, Component]
"""Component of a pipeline → what it may be"""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that the index may list, but that are never loaded"""

_UNREAD = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "cls.", "position_ids")
"""Weights that files of text encoders may have in addition: CLIP's vision model, heads of BERT"""
_LAYER = re.compile(r"encoder\.layers?\.(\d{1,3})\.")
"""A layer of a text encoder; files of bases with clip skip have more layers than their configurations"""
_RENAMED = {
    "vae": ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")),
    "text": ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
}
"""Names in files of earlier versions of the libraries, and their names now"""


def read_index(folder: Path, pipelines: Mapping[str, Components]) -> dict[str, tuple[str, str]]:
    """Read the index of a diffusers folder and return part → library and class; ``""`` stands for the pipeline.

    Args:
        folder: a diffusers folder.
        pipelines: class name of a known pipeline → its components.

    Raises:
        DiffgraftError: the index is missing or damaged, lacks a part, or names an unknown class.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise DiffgraftError(
            f"{folder} is not a diffusers folder: it has no model_index.json. Give the folder that "
            "`save_pretrained` wrote, a single .safetensors checkpoint, a hub id, or `tiny`."
        )
    index = read_object(path)
    kind = index.get("_class_name", "model without a class")
    known = {name: parts for plain, parts in pipelines.items() for name in (plain, inpainting(plain))}
    if not isinstance(kind, str) or kind not in known:
        named = kind if isinstance(kind, str) and len(kind) < 60 else short(kind)
        raise DiffgraftError(f"{folder} is a {named}; supported pipelines are: {', '.join(sorted(pipelines))}.")
    components = known[kind]
    classes_of: dict[str, tuple[str, str]] = {"": ("diffusers", kind)}
    for name, entry in index.items():
        if entry == [None, None] and (name not in components or not components[name].required):
            continue
        if name in components:
            library, classes, _ = components[name]
            if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or entry[1] not in classes:
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
    return isinstance(entry, list) and all(type(value) is int for value in entry)


def build_pipeline(
    folder: Path,
    pipelines: Mapping[str, Components],
    weights: WeightsFrom,
    tokenizers: Mapping[str, Any] | None = None,
) -> Any:
    """Build the diffusers pipeline of a folder; its networks are on ``meta`` unless their weights are read.

    Weights get the dtype of most numbers in their files; the base's hash is computed from them.

    Args:
        folder: a diffusers folder.
        pipelines: class name of a known pipeline → its components.
        weights: whether weights are read from files.
        tokenizers: tokenizers by name, instead of those in the folder.

    Raises:
        DiffgraftError: a part of the folder is unknown, damaged or missing.
    """
    import diffusers

    index = read_index(folder, pipelines)
    parts: dict[str, Any] = {**(tokenizers or {})}
    for name in sorted(index, key=lambda name: name.startswith("tokenizer")):  # tokenizers last, as they take longest
        library, kind = index[name]
        if name in (*denoisers(), "vae") or name.startswith("text_encoder"):
            parts[name] = _network(folder / name, library, kind, has_flow="transformer" in index)
            if weights != "nowhere":
                _fill(parts[name], folder / name, name, is_read=weights == "files")
            parts[name].eval()
        elif name == "scheduler":
            parts[name] = _scheduler(folder / name, kind)
        elif name and name not in parts:
            parts[name] = _tokenizer(folder / name, kind)
    _check_fit(folder, parts)
    options: dict[str, Any] = {name: None for name in pipelines.get(index[""][1], {}) if name not in parts}
    if "unet" in parts and "text_encoder_2" not in parts:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _library_errors(folder, "the parts do not make a pipeline"):
        return getattr(diffusers, index[""][1])(**parts, **options)


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


def _network(folder: Path, library: str, kind: str, *, has_flow: bool = False) -> Any:
    """Create a network from the configuration in `folder`; its parameters are on the device ``meta``."""
    import diffusers
    import transformers

    path = folder / "config.json"
    config = read_object(path)
    if library == "diffusers":
        model: Any = getattr(diffusers, kind)
        values = validated(path, config, _config_of(kind, has_flow=has_flow), model)
        with _library_errors(path, f"no {kind} can be built from it"), _without_weights(has_flow):
            return model.from_config(values)
    model = getattr(transformers, kind)
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


def _config_of(kind: str, *, has_flow: bool) -> type[Config]:
    """Return the known fields of the configuration of a class of diffusers."""
    if kind == "AutoencoderKL" and has_flow:
        return FlowVAEConfig
    return _CONFIGS.get(kind, TransformerConfig)


@contextmanager
def _without_weights(has_flow: bool) -> Iterator[None]:
    """Create networks without weights within the block, on the device ``meta``.

    Tensors that are no parameters, such as tables of positions, are in no file. Networks of flow-matching bases have
    them computed; those of other bases are known, and filled in by `_fill_buffers`.
    """
    if not has_flow:
        with torch.device("meta"):
            yield
        return
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def _normalizer(part: str) -> Callable[[str], str]:
    """Return a function from names of weights to names that do not depend on the version of the libraries."""
    replacements = _RENAMED.get("vae" if part == "vae" else "text" if part.startswith("text") else "", ())

    def normalize(name: str) -> str:
        for old, new in replacements:
            name = name.replace(old, new)
        plain = name.removeprefix("bert.").removeprefix("text_model.")
        return _of_language_model(plain) if part.startswith("text") else name

    return normalize


def _of_language_model(name: str) -> str:
    """Return the name of a weight without the levels that only newer versions of vision-language models have."""
    return name.removeprefix("model.language_model.").removeprefix("model.")


def _fill(network: nn.Module, folder: Path, part: str, *, is_read: bool) -> None:
    """Compare a network on ``meta`` with the headers of its files, and load their weights if `is_read`.

    Raises:
        DiffgraftError: a weight is missing, unknown, of another shape, or not floating-point.
    """
    files = files_of_part(folder)
    if not files:
        raise DiffgraftError(
            f"{folder} has no weights in .safetensors; other files may hold code and are not opened: convert them, "
            "or copy the model's folder again."
        )
    normalize = _normalizer(part)
    wanted = {normalize(name): (name, value) for name, value in network.state_dict().items()}
    state: dict[str, Tensor] = {}
    layers = int(getattr(getattr(network, "config", None), "num_hidden_layers", 0))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    if normalize(key) not in wanted:
                        if part.startswith("text") and (key.endswith(_UNREAD) or normalize(key).startswith(_UNREAD)):
                            continue
                        if part.startswith("text") and (layer := _layer_beyond(normalize(key), layers)) is not None:
                            raise DiffgraftError(
                                f"{file} holds {key}, but {folder}/config.json has num_hidden_layers={layers}, which "
                                "may have been lowered for clip skip. To use all layers, set num_hidden_layers to "
                                f"{layer + 1} or more; to use {layers}, load the folder with diffusers and save it."
                            )
                        raise DiffgraftError(
                            f"{file} holds {short(key)}, which is not a weight of the {part} that {folder}/config.json "
                            "describes: the two belong to different models."
                        )
                    name, value = wanted[normalize(key)]
                    tensor = opened.get_slice(key)
                    if tensor.get_shape() != [*value.shape]:
                        raise DiffgraftError(
                            f"{file} holds {key} of shape {tensor.get_shape()}, but by {folder}/config.json it is "
                            f"{[*value.shape]}: the two belong to different models."
                        )
                    if tensor.get_dtype() not in FLOAT_DTYPES and value.is_floating_point():
                        raise DiffgraftError(
                            f"{file} holds {key} in {tensor.get_dtype()}; weights must be float32 or half precision."
                        )
                    state[name] = opened.get_tensor(key).clone() if is_read else value
        except (SafetensorError, OSError) as error:
            raise DiffgraftError(f"{file} is not a readable .safetensors file ({error}); copy it again.") from error
    tied = getattr(network, "all_tied_weights_keys", {})  # a weight that another one stands for is in no file
    missing = [name for name, _ in wanted.values() if name not in state and name not in tied]
    if missing:
        raise DiffgraftError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} weights that its config.json describes, such as "
            f"{missing[0]}: copy the model's folder again."
        )
    if is_read:
        dtype = _most_common_dtype(state)
        values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        network.load_state_dict(values, strict=not tied, assign=True)
        if tied:
            network.tie_weights()  # type: ignore[operator]
        _fill_buffers(network)


def _layer_beyond(name: str, layers: int) -> int | None:
    """Return the index of a weight's layer if a text encoder with `layers` layers does not have it, else None."""
    match = _LAYER.match(name)
    return int(match[1]) if match and int(match[1]) >= layers else None


def _most_common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for value in filter(Tensor.is_floating_point, state.values()):
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _fill_buffers(network: nn.Module) -> None:
    """Fill the buffers of text encoders, position and token type ids, which are in no file."""
    for path, module in network.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if not value.is_meta:
                continue
            if name == "position_ids":
                setattr(module, name, torch.arange(value.shape[-1]).expand(value.shape).contiguous())
            elif name == "token_type_ids":
                setattr(module, name, torch.zeros(value.shape, dtype=torch.long))
            else:
                raise DiffgraftError(f"{type(network).__name__} has a buffer {path}.{name} that is in no file.")


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
    for name in (name for name in parts if name.startswith("text_encoder") and parts[name] is not None):
        place = name.replace("text_encoder", "tokenizer")
        with _library_errors(folder / place, "the tokenizer is damaged"):
            tokenizer, config = parts[place], parts[name].config.get_text_config()
            size, longest = config.vocab_size, tokenizer.model_max_length
            if type(tokenizer).__name__.startswith("CLIP") and longest != config.max_position_embeddings:
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
