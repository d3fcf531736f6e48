"""Key names with dots, as ComfyUI, ai-toolkit and OneTrainer write them: ``<part>.<path>.<leaf>``.

ComfyUI names modules as its models do: ``diffusion_model.`` with the path of the original layout, and
``text_encoders.clip_l.transformer.text_model.…`` (its extraction node also writes ``.diff`` and ``.diff_b``, and no
alpha). OneTrainer's names of the Open Model Initiative are ``unet.`` with the original path, ``clip_l.``, ``clip_g.``;
its diffusers names are ``lora_unet.``, ``lora_te1.`` or ``unet.``, ``text_encoder.`` with diffusers' paths. Leaves are
those of `modules`. ``clip_h`` is the only text encoder of Stable Diffusion 2, OpenCLIP's ViT-H.

For transformers, ai-toolkit writes ``diffusion_model.`` with the original path and the leaves ``lora_A`` and ``lora_B``
without an alpha, so that the scale is 1; such files are written here too, and for UNets none. OneTrainer's names of the
Open Model Initiative are ``transformer.`` with the original path, and the number of its part for a part of a fused
layer. Other tools write diffusers' paths, or no prefix, or peft's prefix ``base_model.model.`` without peft's folder.
Sources: ComfyUI, ``comfy/lora.py`` and ``comfy_extras/nodes_lora_extract.py``; OneTrainer, ``convert_sdxl_lora.py`` and
``convert_flux_lora.py``; musubi-tuner, ``convert_lora.py``; ostris/ai-toolkit, ``toolkit/network_mixins.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import diffusers_legacy, embedding
from diffgraft.adapters.formats.diffusers_lora import strip_adapter_name
from diffgraft.adapters.formats.families import family_of
from diffgraft.adapters.formats.header import write_metadata
from diffgraft.adapters.formats.join_deltas import join_deltas
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.lycoris import named_leaves, read_adapter
from diffgraft.adapters.formats.modules import ENDINGS, KINDS, Module, leaf_of
from diffgraft.adapters.formats.original_names import (
    PART,
    is_for_transformer,
    is_known,
    is_of_diffusers,
    write_layers,
)
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.methods.lora import with_alpha
from diffgraft.bases.ldm_keys import LDM_PREFIXES

_PEFT_PREFIX = "base_model.model."
_QWEN3 = "text_encoders.qwen3_06b.transformer.model."
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder",
    "clip_h.transformer.": "text_encoder",
    "clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_h.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "lora_unet.": "unet",
    "lora_te.": "text_encoder",
    "lora_te1.": "text_encoder",
    "lora_te2.": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "transformer.": PART,
    "lora_transformer.": PART,
    f"{_PEFT_PREFIX}diffusion_model.": PART,
    f"{_PEFT_PREFIX}transformer.": PART,
    _PEFT_PREFIX: PART,
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "t5.": "text_encoder_3",
    "lora_te3.": "text_encoder_3",
    _QWEN3: "text_encoder",
}
"""Beginning of a key → part of the base; longer beginnings come before shorter ones"""
_LORA_LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
"""Leaf of a LoRA in kohya's files → its name in ai-toolkit's"""
_CLIP_L = {"text_encoder": "text_encoders.clip_l.transformer."}
_TEXT_PREFIXES = {
    "flux1": _CLIP_L,
    "sd3": {**_CLIP_L, "text_encoder_2": "text_encoders.clip_g.transformer."},
    "anima": {"text_encoder": _QWEN3},
}
"""Family of a transformer → text encoder → beginning of its keys in written files"""
_PEFT_ENDINGS = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    *(".magnitude", ".dora_scale"),
)
_DIFFUSERS_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.", "transformer.")
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "lora_unet.")
"""Beginnings under which files have the layers of a UNet, or of a transformer"""
_KEY = re.compile(
    r"(?P<path>.+?)\.(?P<ending>[^.]+|(?:lora_\w+|[ab][12]|bm|oft_R|dora_scale|lora_magnitude_vector)\.weight"
    r"|oft_R\.scaled_oft)"
)


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key looks like this dialect, and not like those that diffusers writes."""
    return any(_is_dotted(key) for key in tensors)


def _is_dotted(key: str) -> bool:
    key = strip_adapter_name(key)
    parsed = _parse_key(key)
    if parsed is None or diffusers_legacy.parse_key(key):
        return False
    prefix, _, inside, leaf = parsed
    has_original_name = inside.startswith(LDM_PREFIXES) or (is_known(inside) and not is_of_diffusers(inside))
    may_be_diffusers = prefix in _DIFFUSERS_PREFIXES and not has_original_name
    return not may_be_diffusers or (leaf != "weight" and not key.endswith(_PEFT_ENDINGS))


def _parse_key(key: str) -> tuple[str, str, str, str] | None:
    """Prefix, part, path inside the part, and leaf of `key`; None if the key is not of this form."""
    key = strip_adapter_name(key)
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    match = _KEY.fullmatch(key.removeprefix(prefix))
    leaf = leaf_of(match["ending"]) if match else None
    if match is None or leaf is None or not (prefix or is_known(match["path"])):
        return None
    part = _PREFIXES[prefix] if prefix else PART
    if prefix in _DENOISER_PREFIXES and is_known(match["path"]):
        part = PART
    return prefix, part, match["path"].removeprefix("text_model."), leaf


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Build the adapter; `layers` as in `lycoris.read`. Raises ValueError for an unknown key or invalid leaves."""
    modules: dict[str, Module] = {}
    bundled = {key: value for key, value in tensors.items() if embedding.is_bundled(key)}
    in_transformer = any(parsed[1] == PART for key in tensors if (parsed := _parse_key(key)))
    for key, value in tensors.items():
        if key in bundled:
            continue
        parsed = _parse_key(key)
        if parsed is None:
            raise UnknownKeyError(key, f"<part>.<module>.<leaf> of {', '.join(KINDS)}", list(_PREFIXES), ENDINGS)
        prefix, part, inside, leaf = parsed
        if in_transformer and prefix in _DENOISER_PREFIXES:
            part = PART
        modules.setdefault(f"{prefix}{inside}", Module(part, inside)).add_leaf(key, leaf, value)
    return read_adapter(modules, bundled, header, layers, has_kohya_names=False)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header, in ai-toolkit's names. Raises ValueError for contents that the files cannot hold."""
    if not is_for_transformer(adapter):
        raise ValueError("it does not change a transformer, and for other bases ComfyUI reads kohya's files: use kohya")
    if adapter.tokens:
        raise ValueError(f"it holds words ({', '.join(adapter.tokens)}), but such files hold only weights")
    family = family_of(adapter)
    named = {f"diffusion_model.{path}": deltas for path, deltas in write_layers(adapter, family).items()}
    for path, deltas in adapter.deltas.items():
        part, _, inside = path.partition(".")
        if part in _TEXT_PREFIXES.get(family or "", {}):
            named[f"{_TEXT_PREFIXES[family or ''][part]}{add_text_model(inside)}"] = join_deltas(path, deltas)
        elif part != PART:
            raise ValueError(
                f"{path} is in {part}, which has no name in such files for {family or 'an unknown family'}"
            )
    tensors: dict[str, Tensor] = {}
    for path, deltas in named.items():
        for delta in deltas:
            leaves = named_leaves(adapter, path, _with_scale_one(delta))
            if delta.is_lora:
                del leaves["alpha"]
            tensors |= {f"{path}.{_LORA_LEAVES.get(name, name)}": value for name, value in leaves.items()}
    return tensors, {"format": "pt", **write_metadata(adapter)}


def _with_scale_one(delta: Delta) -> Delta:
    """A LoRA with its scale in ``lora_up``, with or without DoRA; other deltas are returned unchanged."""
    lora = delta.direction if isinstance(delta, DoraDelta) else delta
    if not delta.is_lora or not isinstance(lora, FactorDelta):
        return delta
    lora = with_alpha(lora, lora.rank)
    return replace(delta, direction=lora) if isinstance(delta, DoraDelta) else lora


DIALECT = Dialect(
    name="comfyui",
    summary="names with dots of ComfyUI, ai-toolkit and OneTrainer; written for transformers",
    order=30,
    recognises=recognises,
    read=read,
    write=write,
)
