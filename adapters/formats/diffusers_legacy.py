"""Diffusers' older names for LoRA, which its scripts still write, for attentions and beside today's: read only.

Layers of a UNet's attentions have ``.lora.`` before ``down.weight`` and ``up.weight``, those of text encoders
``.lora_linear_layer.``. Older files name the attention's processor, ``attn1.processor.to_q_lora.down.weight``, with
``to_out_lora`` for ``to_out.0`` and, in text encoders, ``self_attn.to_q_lora`` for ``q_proj``. The first files held the
UNet alone, without the level ``unet.``.
Source: diffusers 0.42.1, ``utils/state_dict_utils.py``.
"""

import re

_KEY = re.compile(
    r"(?:(?P<part>unet|text_encoder|text_encoder_2)\.)?(?P<path>[\w.]+?)"
    r"(?:\.lora|\.lora_linear_layer|(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora)\.(?P<leaf>down|up)\.weight"
)
ENDINGS = (".lora.down.weight", ".lora.up.weight")


def placed(key: str) -> tuple[str, str] | None:
    """The path of the module, as adapters have it, and the leaf that `key` stands for; None where it is no such key."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    part = found["part"] or "unet"
    path = f"{part}.{found['path'].removeprefix('text_model.')}{_layer(part, found['layer'])}"
    return path, f"lora_{found['leaf']}"


def _layer(part: str, letter: str | None) -> str:
    """The layer that a processor's name for it stands for, a leading dot included."""
    if letter is None:
        return ""
    if part == "unet":
        return ".to_out.0" if letter == "out" else f".to_{letter}"
    return f".{letter}_proj"
