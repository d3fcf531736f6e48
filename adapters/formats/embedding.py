"""Textual inversion files: one word, no weights.

One text encoder: ``{word: [n, width]}``, as diffusers writes them (``learned_embeds.safetensors``) and webui and
ComfyUI read them; ``string_to_param.*`` in webui's own ``.pt`` files, and ``emb_params`` in those of kohya's tools,
where the file's name is the word. Two: ``clip_l`` [n, 768] and ``clip_g`` [n, 1280], as the tools for Stable Diffusion
XL have it; the word then stands in our header, or is the file's name.
"""

from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats.header import OURS, read_json, told, write_ours
from diffgraft.adapters.formats.opened import STEM

PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Key in files of two text encoders → the encoder."""


_NAMELESS = ("string_to_param.*", "emb_params")
"""Keys under which one word lies whose name is that of the file."""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether it is one matrix under a name without levels, or the pair of the larger family."""
    alone = len(tensors) == 1 and all(key and "." not in key and value.ndim in (1, 2) for key, value in tensors.items())
    return alone or set(tensors) == set(PARTS) or any(key in _NAMELESS for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Raises ValueError where something is no list of vectors, or there is more than one word."""
    for key, value in tensors.items():
        if value.ndim not in (1, 2) or 0 in value.shape:
            raise ValueError(f"its key {key} is {list(value.shape)}, which is no list of vectors")
    rows = {key: value if value.ndim == 2 else value.unsqueeze(0) for key, value in tensors.items()}
    ours = read_json(header, OURS)
    word = str(ours.get("trigger") or header.get(STEM, "<word>"))
    if set(rows) == set(PARTS):
        tokens = {word: {PARTS[key]: value for key, value in rows.items()}}
    elif len(rows) > 1:
        raise ValueError(f"it holds {', '.join(sorted(rows))}; one word was expected")
    else:
        ((key, value),) = rows.items()
        word = word if key in _NAMELESS else key
        tokens = {word: {"text_encoder": value}}
    return Adapter({}, told(header, method="textual-inversion", trigger=word), tokens=tokens)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where there is more, or less, than one word."""
    if adapter.deltas or len(adapter.tokens) != 1:
        raise ValueError(
            f"it holds {len(adapter.deltas)} modules and {len(adapter.tokens)} words; it can be one word alone: "
            "--only WORD takes it out"
        )
    ((word, vectors),) = adapter.tokens.items()
    header = {"format": "pt", **write_ours(adapter)}
    if set(vectors) == {"text_encoder"}:
        return {word: vectors["text_encoder"].contiguous()}, header
    if set(vectors) != set(PARTS.values()) or adapter.metadata.get("trigger") != word:
        raise ValueError("it needs vectors for both text encoders, and the word as the trigger")
    return {key: vectors[part].contiguous() for key, part in PARTS.items()}, header
