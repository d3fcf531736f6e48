"""Validation of the configuration files in a base's folder, which are not trusted.

A folder may come from anyone. Only the fields listed here, and fields with the type of the library's own default, reach
the libraries. Sizes are bounded, so that no absurdly large network is built. Values that training and generation do not
support (class embeddings, shifted latents, flow matching) are refused instead of being ignored.
"""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from diffgraft.errors import DiffgraftError

LARGEST_JSON = 2**22
"""Bytes of a configuration file at most; real ones have a few thousand"""
_SHOWN = 60
"""Characters of an invalid value that a message shows"""

Depth = Annotated[int, Field(ge=0, le=64)]
Layers = Annotated[int, Field(ge=1, le=64)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Side = Annotated[int, Field(ge=1, le=2**12)]
Levels = Annotated[list[Width], Field(min_length=1, max_length=8)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**22)] | None


class Config(BaseModel):
    """Known fields of a configuration; missing ones keep the library's defaults."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class UNetConfig(Config):
    """Configuration of a ``UNet2DConditionModel``; that of SDXL also has pooled embeddings and size conditioning."""

    sample_size: Side
    in_channels: Side = 4
    out_channels: Side = 4
    down_block_types: list[Literal["DownBlock2D", "CrossAttnDownBlock2D"]] = []
    up_block_types: list[Literal["UpBlock2D", "CrossAttnUpBlock2D"]] = []
    block_out_channels: Levels = []
    layers_per_block: Layers | list[Layers] = 2
    transformer_layers_per_block: Depth | list[Depth | list[Depth]] = 1
    reverse_transformer_layers_per_block: Depth | list[Depth | list[Depth]] | None = None
    attention_head_dim: Width | list[Width] = 8
    num_attention_heads: Width | list[Width] | None = None
    cross_attention_dim: Width
    norm_num_groups: Width = 32
    norm_eps: Epsilon = 1e-5
    time_embedding_dim: Width | None = None
    time_cond_proj_dim: Width | None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None
    class_embed_type: None = None
    num_class_embeds: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None


class VAEConfig(Config):
    """An ``AutoencoderKL`` of RGB pictures, with scaled but not shifted latents."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Annotated[int, Field(ge=1, le=128)] = 4
    down_block_types: list[Literal["DownEncoderBlock2D"]] = []
    up_block_types: list[Literal["UpDecoderBlock2D"]] = []
    block_out_channels: Levels = []
    layers_per_block: Layers = 1
    norm_num_groups: Width = 32
    scaling_factor: Annotated[float, Field(gt=0, le=1000)] = 0.18215
    shift_factor: Literal[0] | None = None
    latents_mean: None = None
    latents_std: None = None


class FlowVAEConfig(VAEConfig):
    """An autoencoder of a flow-matching base, whose latents may be shifted."""

    shift_factor: Annotated[float, Field(ge=-1000, le=1000)] | None = None  # type: ignore[assignment]


class VideoVAEConfig(Config):
    """An ``AutoencoderKLQwenImage``, an autoencoder of videos, of which pictures are single frames."""

    base_dim: Width = 96
    z_dim: Annotated[int, Field(ge=1, le=128)] = 16
    dim_mult: Levels = []
    num_res_blocks: Layers = 2
    temperal_downsample: Annotated[list[bool], Field(min_length=1, max_length=8)] = []
    latents_mean: Annotated[list[float], Field(min_length=1, max_length=128)] = []
    latents_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=128)] = []


class AlphaVAEConfig(VideoVAEConfig):
    """An ``AutoencoderKLQwenImage21``, whose pictures have an alpha channel."""

    decoder_base_dim: Width | None = None
    z_dim: Annotated[int, Field(ge=1, le=1024)] = 64
    in_channels: Literal[4] = 4
    out_channels: Literal[4] = 4
    patch_size: None = None


class TransformerConfig(Config):
    """A transformer that predicts the flow; sizes are bounded, and all else has the types of the library's defaults."""

    sample_size: Side | None = None
    patch_size: Side | None = None
    in_channels: Side = 16
    out_channels: Side | None = None
    num_layers: Layers = 1
    num_single_layers: Depth = 0
    num_refiner_layers: Depth = 0
    n_layers: Layers = 1
    n_refiner_layers: Depth = 0
    attention_head_dim: Width = 64
    num_attention_heads: Width = 8
    dim: Width = 64
    n_heads: Width = 8
    n_kv_heads: Width = 8
    joint_attention_dim: Width = 64
    pooled_projection_dim: Width = 64
    caption_projection_dim: Width = 64
    pos_embed_max_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    all_patch_size: Annotated[list[Side], Field(min_length=1, max_length=4)] = []
    context_in_dim: Width = 64


def _of_pictures(patch: list[int]) -> list[int]:
    if patch != [1, 2, 2]:
        raise ValueError("a token must be one frame of 2 × 2 latents")
    return patch


class CosmosConfig(Config):
    """A ``CosmosTransformer3DModel`` that draws pictures, without control and without pictures as a condition."""

    in_channels: Side = 16
    out_channels: Side = 16
    num_attention_heads: Width = 32
    attention_head_dim: Annotated[int, Field(ge=16, le=2**12)] = 128
    num_layers: Layers = 28
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    text_embed_dim: Width = 1024
    adaln_lora_dim: Width = 256
    max_size: Annotated[list[Side], Field(min_length=3, max_length=3)] = []
    patch_size: Annotated[list[int], AfterValidator(_of_pictures)] = [1, 2, 2]
    rope_scale: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=3, max_length=3)] = []
    extra_pos_embed_type: None
    use_crossattn_projection: Literal[False] = False
    controlnet_block_every_n: None = None
    img_context_dim_in: None = None


class ConditionerConfig(Config):
    """An ``AnimaTextConditioner``; its states of every prompt have the same number of tokens."""

    source_dim: Width = 1024
    target_dim: Width = 1024
    model_dim: Width = 1024
    num_layers: Layers = 6
    num_attention_heads: Width = 16
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    target_vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 32128
    min_sequence_length: Annotated[int, Field(ge=512, le=4096)] = 512


class ClipConfig(Config):
    """A ``CLIPTextConfig``, without fields that only the library's own loading uses, such as `model_type`."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width | None = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Width = 77
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "gelu_fast", "relu", "silu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Share = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: TokenId = 1
    bos_token_id: TokenId = 49406
    eos_token_id: TokenId = 49407


class BertConfig(Config):
    """A ``BertConfig`` of an encoder with absolute position embeddings."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 30522
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Width = 12
    max_position_embeddings: Width = 512
    type_vocab_size: Width = 2
    hidden_act: Literal["gelu", "gelu_new", "gelu_fast", "relu", "silu"] = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    initializer_range: float = 0.02
    pad_token_id: TokenId = 0
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False


class LanguageModelConfig(Config):
    """A T5 encoder or a language model, whose hidden states tell a denoiser about a prompt."""

    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 32128
    num_layers: Layers | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] | None = None
    depth: Annotated[int, Field(ge=1, le=256)] | None = None
    d_model: Width | None = None
    d_ff: Annotated[int, Field(ge=1, le=2**18)] | None = None
    hidden_size: Width | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=2**18)] | None = None
    num_heads: Width | None = None
    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None


class FlowSchedulerConfig(Config):
    """A ``FlowMatchEulerDiscreteScheduler``."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Annotated[float, Field(ge=0, le=20)] | None = 0.5
    max_shift: Annotated[float, Field(ge=0, le=20)] | None = 1.15
    base_image_seq_len: Annotated[int, Field(ge=1, le=2**16)] | None = 256
    max_image_seq_len: Annotated[int, Field(gt=2**10, le=2**20)] | None = 4096
    invert_sigmas: Literal[False] = False
    stochastic_sampling: Literal[False] = False


class SchedulerConfig(Config):
    """A scheduler of a diffusion model that predicts ε or v."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: Annotated[list[Beta], Field(min_length=2, max_length=100_000)] | None = None
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2


def read_object(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read the JSON object in a file of at most `largest` bytes.

    Raises:
        DiffgraftError: the file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise DiffgraftError(f"{path} is missing, or is not a file; copy the model's folder again.")
    if path.stat().st_size > largest:
        raise DiffgraftError(
            f"{path} is larger than {largest:,} bytes, so it is damaged or another file: copy it again."
        )
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DiffgraftError(f"{path} cannot be read as JSON ({error}); copy the model's folder again.") from error
    if not isinstance(value, dict):
        raise DiffgraftError(f"{path} is not a JSON object; copy the model's folder again.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def validated(path: Path, config: Mapping[str, Any], model: type[Config], kind: type | None = None) -> dict[str, Any]:
    """Validate a configuration, and return the values that may be passed to the library.

    Args:
        path: file of the configuration, for messages.
        config: the JSON object in it.
        model: known fields with their types and bounds.
        kind: the library's class; further arguments of it are allowed if they have the type of their defaults.

    Raises:
        DiffgraftError: a value is of another type, out of bounds or not supported.
    """
    if config.get("quantization_config") is not None:
        raise DiffgraftError(
            f"{path} has quantization_config: the weights are already quantized. Use the model in float32 or half "
            "precision, and quantize=int8 or nf4."
        )
    if model is SchedulerConfig and config.get("prediction_type") in ("sample", "flow_prediction", "flow"):
        raise DiffgraftError(
            f"{path} has prediction_type={config['prediction_type']}: only bases that predict noise (epsilon) or v "
            "(v_prediction) are supported; use such a base."
        )
    fields = model.model_fields
    defaults = {} if kind is None else _defaults(kind)
    values = {key: value for key, value in config.items() if key in fields or key in defaults}
    try:
        model.model_validate({key: value for key, value in values.items() if key in fields})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        problem = f"has {key}={short(values[key])}" if key in values else f"has no {key}"
        raise DiffgraftError(f"{path} {problem}, which is not supported: {_reason(first)}.") from error
    for key, value in values.items():
        if key not in fields and not _has_type_of(value, defaults[key]):
            raise DiffgraftError(f"{path} has {key}={short(value)}, but needs a value like {defaults[key]!r}.")
    return {key: value for key, value in values.items() if key in defaults or kind is None}


def validated_language_model(path: Path, config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Validate the configuration of a transformers model, and return the values that may be passed to its class.

    Names of attention kernels, code and quantization never reach the library.

    Args:
        path: file of the configuration, for messages.
        config: the JSON object in it.
        kind: the library's configuration class; a model that has others in it has a nested object for each.

    Raises:
        DiffgraftError: a value is of another type, out of bounds or not supported.
    """
    nested = {name: own for name, own in kind.sub_configs.items() if isinstance(config.get(name), dict)}
    plain = {key: value for key, value in config.items() if not isinstance(value, dict) or key == "quantization_config"}
    own = {key: value for key, value in plain.items() if key not in nested}
    values = validated(path, own, LanguageModelConfig, kind)
    if theta := _rope_theta(config):
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **_rope_sections(config)}
    return values | {name: validated_language_model(path, config[name], part) for name, part in nested.items()}


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    """Return the base of a model's rotary positions, from today's field or from that of earlier versions."""
    rope = config.get("rope_parameters")
    theta = config.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
    return float(theta) if isinstance(theta, int | float) and 1 <= theta <= 1e9 else None


def _rope_sections(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the share of each axis in the rotary positions of a vision-language model; empty for others."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        sections = rope.get("mrope_section") if isinstance(rope, dict) else None
        if isinstance(sections, list) and len(sections) == 3 and all(type(share) is int for share in sections):
            return {"mrope_section": sections}
    return {}


def _reason(error: Any) -> str:
    text = str(error["msg"])
    return text[0].lower() + text[1:]


def _defaults(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether a JSON value has the type of an argument's default; numbers must be small, and texts short."""
    if value is None or (default is None and not isinstance(value, dict)):
        return value is None or _has_type_of(value, value)
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and (isinstance(default, bool) or default is None)
    if isinstance(value, str):
        return isinstance(default, str) and len(value) < 100
    if isinstance(value, int | float):
        return isinstance(default, int | float | tuple | list) and math.isfinite(value) and abs(value) <= 2**20
    if isinstance(value, list):
        return isinstance(default, list | tuple | int) and len(value) < 100 and all(_has_type_of(v, v) for v in value)
    return False


def short(value: object) -> str:
    """Return the `repr` of an invalid value, cut to its first characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
