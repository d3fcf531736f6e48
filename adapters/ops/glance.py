"""Summary of an adapter file from its header, without reading tensors or importing torch, which takes a second."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from diffgraft.adapters.training_metadata import read_training, recipe_lines, tags, training_settings

_MAX_HEADER = 100_000_000
"""Maximum length of a header in bytes; safetensors refuses longer headers as well"""
_PREFIX = re.compile(r"(?:lora_(?:(?P<denoiser>unet)|te(?P<number>[12])?)_|(?P<part>\w+?)\.)")
"""Beginning of a key: kohya's name of a part of the base, or the name of the part itself"""
_KINDS = {
    "lora_down": "lora",
    "lora_A": "lora",
    "hada_w1_a": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "diff": "full",
}
"""Leaf that each module of a method has once → method"""
_TWO_NAMES = (
    *(("mid_block", "middle_block"), ("down_blocks", "input_blocks"), ("up_blocks", "output_blocks")),
    *(("lora_te_", "lora_te1_"), ("lycoris_", "lora_unet_")),
)
"""Pairs of names that one layer may have; a file with both can hold layers twice, which only reading it shows"""
_TRANSFORMER = re.compile(
    r"(?:lora_unet_|(?:model\.)?diffusion_model\.)"
    r"(?!(?:down|up|mid|input|output|middle)_block|conv_|time_embed|add_embedding|label_emb|out[_.])"
    r"|lora_transformer[_.]|base_model\."
)
"""Beginning of a key of a transformer's layer, which can stand for several layers, as only reading the file shows"""
_WORDS = ("emb_params", "clip_l", "clip_g")
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
"""Dtype of a single number → format of its bytes"""
FIGURES_HINT = "norms, effective ranks and dead modules: --figures"
"""Hint that the command line prints after the lines of `glance`"""
_MAX_TAGS = 12
"""Maximum number of tags that are listed"""


def glance(path: Path) -> list[str] | None:
    """Return a summary of an adapter file from its header, as lines of text.

    Returns:
        The lines, or None if `path` is not a safetensors file or the header does not tell enough, so that the tensors
        have to be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size):
                return None
            entries = json.loads(file.read(length))
            header = entries.pop("__metadata__", {})
            return _lines(path, entries, header, 8 + length, file)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError, struct.error):
        return None  # reading the whole file gives the error message


def _lines(
    path: Path, entries: Mapping[str, Any], header: Mapping[str, str], start: int, file: BinaryIO
) -> list[str] | None:
    metadata = json.loads(header.get("diffgraft", "{}"))
    known: dict[str, Any] = metadata or read_training(header)
    modules = {key: entry for key, entry in entries.items() if _leaf(key) in _KINDS and _part(key)}
    bundled = {key.split(".")[1] for key in entries if key.startswith("bundle_emb.")}
    words = {key: entry for key, entry in entries.items() if key in _WORDS or (len(entries) == 1 and "." not in key)}
    if not known or not (modules or words) or not isinstance(known.get("base", {}), Mapping):
        return None
    if any(_TRANSFORMER.match(key) for key in modules):
        return None
    if any(all(any(name in key for key in modules) for name in pair) for pair in _TWO_NAMES):
        return None
    kinds = Counter(_kind(key, entry) for key, entry in modules.items())
    base = known.get("base") or {}
    lines = [f"method   {known.get('method') or ' and '.join(sorted(kinds)) or 'textual-inversion'}"]
    lines += [
        f"{name:8} {known[name]}" for name in ("rank", "alpha", "trigger", "class", "seed") if known.get(name, "") != ""
    ]
    if base:
        details = ", ".join(str(word) for word in (base.get("family"), str(base.get("hash", ""))[:12]) if word)
        lines.append(f"base     {base.get('name', '–')} ({details})")
    if isinstance(known.get("recipe"), Mapping):
        lines += recipe_lines(known["recipe"])
    if modules:
        parts = Counter(_part(key) for key in modules)
        lines.append(f"modules  {', '.join(f'{count} in {part}' for part, count in parts.items())}")
        lines.append(f"kinds    {', '.join(f'{kind} × {count}' for kind, count in kinds.items())}")
    ranks = Counter(entry["shape"][0] for key, entry in modules.items() if _leaf(key) in ("lora_down", "lora_A"))
    lines += [f"ranks    {_format_counts(ranks)}"] if ranks else []
    alphas = Counter(_alphas(entries, start, file))
    lines += [f"alphas   {_format_counts(alphas)}"] if alphas else []
    lines += [f"word     {key}: {' × '.join(map(str, entry['shape']))}" for key, entry in words.items()]
    lines += [f"word     {word}" for word in sorted(bundled)]
    dtypes = Counter(entry["dtype"] for entry in entries.values())
    lines.append(f"file     {path.stat().st_size / 1000:,.0f} kB, {', '.join(sorted(dtypes))}")
    lines += [f"{name:8} {value}" for name, value in training_settings(header).items()] if not metadata else []
    if counted := tags(header):
        more = f" and {len(counted) - _MAX_TAGS} more" if len(counted) > _MAX_TAGS else ""
        lines.append(f"tags     {', '.join(f'{tag} ({count})' for tag, count in counted[:_MAX_TAGS])}{more}")
    return list(dict.fromkeys(lines))  # a seed can be in both kinds of metadata


def _format_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value:g} × {count}" for value, count in sorted(counts.items()))


def _part(key: str) -> str:
    if (match := _PREFIX.match(key)) is None:
        return ""
    text_encoder = "text_encoder" + (f"_{match['number']}" if match["number"] == "2" else "")
    return match["denoiser"] or match["part"] or text_encoder


def _leaf(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def _kind(key: str, entry: Mapping[str, Any]) -> str:
    kind, shape = _KINDS[_leaf(key)], entry["shape"]
    return "locon" if kind == "lora" and len(shape) == 4 and max(shape[2:]) > 1 else kind


def _alphas(entries: Mapping[str, Any], start: int, file: BinaryIO) -> Iterator[float]:
    """Yield the alphas in a safetensors file, reading only their bytes and not the weights."""
    for key, entry in entries.items():
        if key.endswith(".alpha") and not entry["shape"]:
            first, last = entry["data_offsets"]
            file.seek(start + first)
            content = file.read(last - first)
            if entry["dtype"] == "BF16":
                content, code = b"\0\0" + content, "<f"
            else:
                code = _NUMBERS[entry["dtype"]]
            yield float(struct.unpack(code, content)[0])
