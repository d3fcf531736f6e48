"""Key names with dots, as ComfyUI and OneTrainer write them beside kohya's: ``<part>.<path>.<leaf>``. Read only.

ComfyUI names modules as its models do: ``diffusion_model.`` with the path of the original layout, and
``text_encoders.clip_l.transformer.text_model.…`` (its extraction node also writes ``.diff`` and ``.diff_b``, and no
alpha). OneTrainer's names of the Open Model Initiative are ``unet.`` with the original path, ``clip_l.``, ``clip_g.``;
its diffusers names are ``lora_unet.``, ``lora_te1.`` or ``unet.``, ``text_encoder.`` with diffusers' paths. Leaves are
those of `modules`. ``clip_h`` is the only text encoder of Stable Diffusion 2, OpenCLIP's ViT-H.
Sources: ComfyUI, ``comfy/lora.py`` and ``comfy_extras/nodes_lora_extract.py``; OneTrainer, ``convert_sdxl_lora.py``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats import diffusers_legacy, embedding
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.lycoris import read_adapter
from diffgraft.adapters.formats.modules import ENDINGS, KINDS, Module, leaf_of
from diffgraft.bases.ldm_keys import LDM_PREFIXES

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
}
"""Beginning of a key → part of the base; longer beginnings come before shorter ones"""
_PEFT_ENDINGS = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    *(".magnitude", ".dora_scale"),
)
_DIFFUSERS_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")
_KEY = re.compile(
    r"(?P<path>.+?)\.(?P<ending>[^.]+|(?:lora_\w+|[ab][12]|bm|oft_R|dora_scale|lora_magnitude_vector)\.weight"
    r"|oft_R\.scaled_oft)"
)


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether a key looks like this dialect, and not like those that diffusers writes."""
    return any(_is_dotted(key) for key in tensors)


def _is_dotted(key: str) -> bool:
    parsed = _parse_key(key)
    if parsed is None or diffusers_legacy.parse_key(key):
        return False
    prefix, _, inside, leaf = parsed
    may_be_diffusers = prefix in _DIFFUSERS_PREFIXES and not inside.startswith(LDM_PREFIXES)
    return not may_be_diffusers or (leaf != "weight" and not key.endswith(_PEFT_ENDINGS))


def _parse_key(key: str) -> tuple[str, str, str, str] | None:
    """Prefix, part, path inside the part, and leaf of `key`; None if the key is not of this form."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
    match = _KEY.fullmatch(key.removeprefix(prefix)) if prefix else None
    leaf = leaf_of(match["ending"]) if match else None
    if prefix is None or match is None or leaf is None:
        return None
    return prefix, _PREFIXES[prefix], match["path"].removeprefix("text_model."), leaf


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Build the adapter; `layers` as in `lycoris.read`. Raises ValueError for an unknown key or invalid leaves."""
    modules: dict[str, Module] = {}
    bundled = {key: value for key, value in tensors.items() if embedding.is_bundled(key)}
    for key, value in tensors.items():
        if key in bundled:
            continue
        parsed = _parse_key(key)
        if parsed is None:
            raise UnknownKeyError(key, f"<part>.<module>.<leaf> of {', '.join(KINDS)}", list(_PREFIXES), ENDINGS)
        prefix, part, inside, leaf = parsed
        modules.setdefault(f"{prefix}{inside}", Module(part, inside)).add_leaf(key, leaf, value)
    return read_adapter(modules, bundled, header, layers, has_kohya_names=False)


DIALECT = Dialect(
    name="comfyui",
    summary="ComfyUI's and OneTrainer's names with dots",
    order=30,
    recognises=recognises,
    read=read,
)
