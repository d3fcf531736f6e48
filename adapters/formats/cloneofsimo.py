"""The first LoRA files of diffusion models: ``unet:<n>:up`` and ``unet:<n>:down``, without names of modules.

n counts the linear layers in the order in which Python walked through the modules of Stable Diffusion 1.x and 2.x in
2022; the header lists under ``unet`` and ``text_encoder`` in which classes they lie. The scale is 1. Words come along
as ``<word>`` [width] or [n, width], marked in the header as ``<embed>``. The oldest files are pickled lists of up,
down, up, down, of one network.
Source: cloneofsimo/lora d84074b, ``lora_diffusion/lora.py``.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import parsed
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.methods.lora import low_rank

_KEY = re.compile(r"(?P<part>unet|text_encoder):(?P<place>\d+):(?P<leaf>up|down)")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
"""The order in which transformers makes them."""
_DEFAULT = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
_TEXT_ENCODERS = (12 * 4, 23 * 4)
"""Layers in the attentions of the text encoders of Stable Diffusion 1.x and 2.x"""
_WORD = "<embed>"


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_KEY.fullmatch(key) for key in tensors) or bool(tensors and all(key.isdecimal() for key in tensors))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key is used, or named in a ValueError."""
    if all(key.isdecimal() for key in tensors):
        tensors = _named(tensors)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match["part"], {}).setdefault(int(match["place"]), {})[match["leaf"]] = value
        elif header.get(key) == _WORD and value.ndim in (1, 2):
            tokens[key] = {"text_encoder": value if value.ndim == 2 else value.unsqueeze(0)}
        else:
            raise UnknownKeyError(key, "unet:<n>:up or down, nor text_encoder:…, nor a word")
    deltas: dict[str, tuple[Delta, ...]] = {}
    for part, pairs in found.items():
        paths = [*_walk(part, _classes(header, part), len(pairs))]
        if len(paths) != len(pairs) or set(pairs) != set(range(len(paths))):
            raise ValueError(
                f"it has {len(pairs)} pairs for {part}, and {len(paths)} were expected of Stable Diffusion 1.x or 2.x"
            )
        for place, path in enumerate(paths):
            if set(pairs[place]) != {"up", "down"}:
                raise ValueError(f"of {part}:{place} it has only {', '.join(pairs[place])}")
            try:
                deltas[f"{part}.{path}"] = (low_rank(pairs[place]["down"], pairs[place]["up"], None),)
            except ValueError as error:
                raise ValueError(f"the factors of {part}:{place} do not fit together: {error}") from error
    said = {"method": "pivotal" if tokens else "lora", **({"trigger": next(iter(tokens))} if tokens else {})}
    return Adapter(deltas, said, tokens=tokens)


def _named(listed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Up, down, up, down under the later names; which network they are of is told by how many there are."""
    part = "text_encoder" if len(listed) // 2 in _TEXT_ENCODERS else "unet"
    return {
        f"{part}:{place // 2}:{'down' if place % 2 else 'up'}": listed[key]
        for place, key in enumerate(sorted(listed, key=int))
    }


def _classes(header: Mapping[str, str], part: str) -> list[str]:
    classes = parsed(header, part) or _DEFAULT[part]
    if not isinstance(classes, list) or any(name not in _DEFAULT[part] for name in classes):
        raise ValueError(
            f"its {part} has layers in {classes}; only those in {', '.join(_DEFAULT[part])} are known here"
        )
    return classes


def _walk(part: str, classes: list[str], count: int) -> Iterator[str]:
    """Paths of the linear layers inside `classes`, in the order of the numbers; the middle came last.

    Text encoders differ in depth: theirs go on until there are `count`.
    """
    if part == "text_encoder":
        for layer in range(count // len(_CLIP)):
            yield from (f"encoder.layers.{layer}.self_attn.{name}" for name in _CLIP)
        return
    blocks = [f"down_blocks.{level}.attentions.{number}" for level in range(3) for number in range(2)]
    blocks += [f"up_blocks.{level}.attentions.{number}" for level in range(1, 4) for number in range(3)]
    for block in (*blocks, "mid_block.attentions.0"):
        inside = f"{block}.transformer_blocks.0"
        if {"CrossAttention", "Attention"} & set(classes):
            yield from (f"{inside}.attn1.{name}" for name in _ATTENTION)
        if "GEGLU" in classes:
            yield f"{inside}.ff.net.0.proj"
        if {"CrossAttention", "Attention"} & set(classes):
            yield from (f"{inside}.attn2.{name}" for name in _ATTENTION)


DIALECT = Dialect(
    name="cloneofsimo",
    summary="the first LoRA files of diffusion models, numbered",
    order=80,
    recognises=recognises,
    read=read,
)
