"""Textual inversion files: one word, no weights.

One text encoder: ``{word: [n, width]}``, as diffusers writes them (``learned_embeds.safetensors``) and webui and
ComfyUI read them. Two: ``clip_l`` [n, 768] and ``clip_g`` [n, 1280], as the tools for Stable Diffusion XL have it; the
word then stands in the header.
"""

from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats.header import OURS, read_json, write_ours

PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Key in files of two text encoders → the encoder."""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether it is one matrix under a name without levels, or the pair of the larger family."""
    alone = len(tensors) == 1 and all("." not in key and value.ndim in (1, 2) for key, value in tensors.items())
    return alone or set(tensors) == set(PARTS)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Raises ValueError where something is no list of vectors."""
    for key, value in tensors.items():
        if value.ndim not in (1, 2) or 0 in value.shape:
            raise ValueError(f"its key {key} is {list(value.shape)}, which is no list of vectors")
    rows = {key: value if value.ndim == 2 else value.unsqueeze(0) for key, value in tensors.items()}
    ours = read_json(header, OURS) or {"method": "textual-inversion"}
    if set(rows) == set(PARTS):
        word = str(ours.get("trigger") or "<word>")
        return Adapter({}, ours, tokens={word: {PARTS[key]: value for key, value in rows.items()}})
    ((word, value),) = rows.items()
    return Adapter({}, ours, tokens={word: {"text_encoder": value}})


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where there is more, or less, than one word."""
    if adapter.deltas or len(adapter.tokens) != 1:
        raise ValueError(f"it holds {len(adapter.deltas)} modules and {len(adapter.tokens)} words; it can be one word")
    ((word, vectors),) = adapter.tokens.items()
    header = {"format": "pt", **write_ours(adapter)}
    if set(vectors) == {"text_encoder"}:
        return {word: vectors["text_encoder"].contiguous()}, header
    if set(vectors) != set(PARTS.values()) or adapter.metadata.get("trigger") != word:
        raise ValueError("it needs vectors for both text encoders, and the word as the trigger")
    return {key: vectors[part].contiguous() for key, part in PARTS.items()}, header
