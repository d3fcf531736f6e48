"""Older key names of LoRA in diffusers, which its scripts still write for attentions, beside today's names: read only.

Layers of a UNet's attentions have ``.lora.`` before ``down.weight`` and ``up.weight``, those of text encoders have
``.lora_linear_layer.``. Older files name the attention's processor, ``attn1.processor.to_q_lora.down.weight``, with
``to_out_lora`` for ``to_out.0`` and, in text encoders, ``self_attn.to_q_lora`` for ``q_proj``. The first files held
only the UNet, without the level ``unet.``.
Source: diffusers 0.42.1, ``utils/state_dict_utils.py``.
"""

import re

_KEY = re.compile(
    r"(?:(?P<part>unet|text_encoder|text_encoder_2)\.)?(?P<path>[\w.]+?)"
    r"(?:\.lora|\.lora_linear_layer|(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora)\.(?P<leaf>down|up)\.weight"
)
ENDINGS = (".lora.down.weight", ".lora.up.weight")


def parse_key(key: str) -> tuple[str, str] | None:
    """Module path (as in `Adapter.deltas`) and leaf name of `key`; None if the key is not of this form."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = match["part"] or "unet"
    path = f"{part}.{match['path'].removeprefix('text_model.')}{_layer_name(part, match['layer'])}"
    return path, f"lora_{match['leaf']}"


def _layer_name(part: str, letter: str | None) -> str:
    """Name, with a leading dot, of the layer that an attention processor calls q, k, v or out."""
    if letter is None:
        return ""
    if part == "unet":
        return ".to_out.0" if letter == "out" else f".to_{letter}"
    return f".{letter}_proj"
