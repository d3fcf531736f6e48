"""Names with dots, as ComfyUI and OneTrainer write them beside kohya's: ``<part>.<path>.<leaf>``.

ComfyUI names modules as its models do: ``diffusion_model.`` and the original layout's path,
``text_encoders.clip_l.transformer.text_model.…`` (its extracting node also writes ``.diff`` and ``.diff_b`` beside, and
no alpha). OneTrainer's Open Model Initiative names (OMI) are ``unet.`` and the original's path, ``clip_l.`` and
``clip_g.``; its diffusers' names are ``lora_unet.``, ``lora_te1.`` or ``unet.``, ``text_encoder.`` and diffusers' path.
Leaves are those of `modules`. OpenCLIP's only text encoder, of Stable Diffusion 2, is ``clip_h``.
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

_STARTS = {
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
"""What a key begins with → the part, the longer before the shorter."""
_OF_PEFT = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    *(".magnitude", ".dora_scale"),
)
_OF_DIFFUSERS = ("unet.", "text_encoder.", "text_encoder_2.")
_KEY = re.compile(
    r"(?P<path>.+?)\.(?P<ending>[^.]+|(?:lora_\w+|[ab][12]|bm|oft_R|dora_scale|lora_magnitude_vector)\.weight"
    r"|oft_R\.scaled_oft)"
)


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect, and not like what diffusers writes itself."""
    return any(_is_own(key) for key in tensors)


def _is_own(key: str) -> bool:
    found = _placed(key)
    if found is None or diffusers_legacy.placed(key):
        return False
    start, _, inside, leaf = found
    of_diffusers = start in _OF_DIFFUSERS and not inside.startswith(LDM_PREFIXES)
    return not of_diffusers or (leaf != "weight" and not key.endswith(_OF_PEFT))


def _placed(key: str) -> tuple[str, str, str, str] | None:
    """Beginning, part, path inside it and leaf; None where it is no such key."""
    start = next((start for start in _STARTS if key.startswith(start)), None)
    found = _KEY.fullmatch(key.removeprefix(start)) if start else None
    leaf = leaf_of(found["ending"]) if found else None
    if start is None or found is None or leaf is None:
        return None
    return start, _STARTS[start], found["path"].removeprefix("text_model."), leaf


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:
    """Every key is used, or named in a ValueError; `layers` as in `lycoris.read`."""
    modules: dict[str, Module] = {}
    bundled = {key: value for key, value in tensors.items() if embedding.is_bundled(key)}
    for key, value in tensors.items():
        if key in bundled:
            continue
        found = _placed(key)
        if found is None:
            raise UnknownKeyError(key, f"<part>.<module>.<leaf> of {', '.join(KINDS)}", list(_STARTS), ENDINGS)
        start, part, inside, leaf = found
        modules.setdefault(f"{start}{inside}", Module(part, inside)).put(key, leaf, value)
    return read_adapter(modules, bundled, header, layers, by_kohya=False)


DIALECT = Dialect(
    name="comfyui",
    summary="ComfyUI's and OneTrainer's names with dots",
    order=30,
    recognises=recognises,
    read=read,
)
