"""The first LoRA files of diffusion models: ``unet:<n>:up`` and ``unet:<n>:down``, without module names. Read only.

n counts the linear layers in the order in which Python iterated over the modules of Stable Diffusion 1.x and 2.x in
2022; the header lists, under ``unet`` and ``text_encoder``, the classes of modules that contain them. The scale is 1.
Learned words are stored as ``<word>`` [width] or [n, width], and marked in the header as ``<embed>``. The oldest files
are pickled lists (up, down, up, down, …) for one network.
Source: cloneofsimo/lora d84074b, ``lora_diffusion/lora.py``.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import parse_json
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.methods.lora import low_rank

_KEY = re.compile(r"(?P<part>unet|text_encoder):(?P<number>\d+):(?P<leaf>up|down)")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
"""Projections of CLIP's attention, in the order in which transformers creates them"""
_DEFAULT_CLASSES = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
_TEXT_ENCODER_SIZES = (12 * 4, 23 * 4)
"""Number of attention projections in the text encoders of Stable Diffusion 1.x and 2.x"""
_WORD_MARK = "<embed>"


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys are numbered as in this dialect, or plain numbers as in its oldest files."""
    return any(_KEY.fullmatch(key) for key in tensors) or bool(tensors and all(key.isdecimal() for key in tensors))


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError for an unknown key, or for pairs that do not match the base's layers."""
    if all(key.isdecimal() for key in tensors):
        tensors = _with_names(tensors)
    factors: dict[str, dict[int, dict[str, Tensor]]] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := _KEY.fullmatch(key):
            factors.setdefault(match["part"], {}).setdefault(int(match["number"]), {})[match["leaf"]] = value
        elif header.get(key) == _WORD_MARK and value.ndim in (1, 2):
            tokens[key] = {"text_encoder": value if value.ndim == 2 else value.unsqueeze(0)}
        else:
            raise UnknownKeyError(key, "unet:<n>:up or down, text_encoder:<n>:up or down, or a word")
    deltas: dict[str, tuple[Delta, ...]] = {}
    for part, pairs in factors.items():
        paths = [*_layer_paths(part, _classes(header, part), len(pairs))]
        if len(paths) != len(pairs) or set(pairs) != set(range(len(paths))):
            raise ValueError(
                f"it has {len(pairs)} pairs for {part}; Stable Diffusion 1.x and 2.x have {len(paths)} such layers"
            )
        for number, path in enumerate(paths):
            if set(pairs[number]) != {"up", "down"}:
                raise ValueError(f"it has only the factor {', '.join(pairs[number])} of {part}:{number}")
            try:
                deltas[f"{part}.{path}"] = (low_rank(pairs[number]["down"], pairs[number]["up"], None),)
            except ValueError as error:
                raise ValueError(f"the factors of {part}:{number} do not fit together: {error}") from error
    metadata = {"method": "pivotal" if tokens else "lora", **({"trigger": next(iter(tokens))} if tokens else {})}
    return Adapter(deltas, metadata, tokens=tokens)


def _with_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a list (up, down, up, down, …) to the later key names; their number tells the network."""
    part = "text_encoder" if len(tensors) // 2 in _TEXT_ENCODER_SIZES else "unet"
    return {
        f"{part}:{place // 2}:{'down' if place % 2 else 'up'}": tensors[key]
        for place, key in enumerate(sorted(tensors, key=int))
    }


def _classes(header: Mapping[str, str], part: str) -> list[str]:
    """Classes of modules that contain the adapted layers of a part, from the header or by default."""
    classes = parse_json(header, part) or _DEFAULT_CLASSES[part]
    if not isinstance(classes, list) or any(name not in _DEFAULT_CLASSES[part] for name in classes):
        raise ValueError(
            f"it adapts {part} layers inside {classes}; supported are only {', '.join(_DEFAULT_CLASSES[part])}"
        )
    return classes


def _layer_paths(part: str, classes: list[str], count: int) -> Iterator[str]:
    """Yield the paths of the linear layers inside `classes` in the order of their numbers; the mid block comes last.

    Text encoders differ in depth, so `count` decides how many layers they have.
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
