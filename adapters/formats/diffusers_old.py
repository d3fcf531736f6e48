"""LoRA in diffusers' older names, which its scripts still write: ``unet.….to_q.lora.down.weight``. Read only.

The scale is 1, unless the header holds peft's configuration, as in `diffusers_lora`. Layers have ``.lora.`` (UNet) or
``.lora_linear_layer.`` (text encoders); older files name the attention's processor,
``attn1.processor.to_q_lora.down.weight``, with ``to_out_lora`` for ``to_out.0`` and, in text encoders,
``self_attn.to_q_lora`` for ``q_proj``. The first files held the UNet alone, without the level ``unet.``.
Source: diffusers 0.42.1, ``utils/state_dict_utils.py``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.diffusers_lora import METADATA, alpha_of
from diffgraft.adapters.formats.header import read_json, told
from diffgraft.adapters.formats.unknown import UnknownKeyError
from diffgraft.adapters.lora import low_rank

_KEY = re.compile(
    r"(?:(?P<part>unet|text_encoder|text_encoder_2)\.)?(?P<path>[\w.]+?)"
    r"(?:\.lora|\.lora_linear_layer|(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora)\.(?P<leaf>down|up)\.weight"
)

_BEGINS = ("unet.", "text_encoder.", "text_encoder_2.")
_ENDINGS = (".lora.down.weight", ".lora.up.weight")


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_KEY.fullmatch(key) for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Every key is used, or named in a ValueError."""
    config = read_json(header, METADATA)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise UnknownKeyError(key, "<part>.<module>.lora.down.weight or lora.up.weight", _BEGINS, _ENDINGS)
        part = found["part"] or "unet"
        path = f"{part}.{found['path'].removeprefix('text_model.')}{_layer(part, found['layer'])}"
        modules.setdefault(path, {})[found["leaf"]] = value
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, pair in modules.items():
        if set(pair) != {"down", "up"}:
            raise ValueError(f"{path} has only one of its two factors, so half of the file is missing")
        try:
            delta = low_rank(pair["down"], pair["up"])
            alpha = alpha_of(config, path, delta.rank)
            deltas[path] = (delta if alpha is None else low_rank(pair["down"], pair["up"], alpha),)
        except ValueError as error:
            raise ValueError(f"the factors of {path} do not fit together: {error}") from error
    return Adapter(deltas, told(header, method="lora"))


def _layer(part: str, letter: str | None) -> str:
    """The layer that a processor's name for it stands for, a leading dot included."""
    if letter is None:
        return ""
    if part == "unet":
        return ".to_out.0" if letter == "out" else f".to_{letter}"
    return f".{letter}_proj"
