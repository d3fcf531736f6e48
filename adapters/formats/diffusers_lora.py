"""The layout that diffusers and peft write today: ``unet.<module path>.lora_A.weight``.

lora_A [r, in] or [r, in, k, k]; lora_B [out, r] or [out, r, 1, 1]. The header key ``lora_adapter_metadata`` holds
peft's LoraConfig as JSON, its keys prefixed with the part (``unet.r``, ``unet.lora_alpha``, ``unet.rank_pattern``, …);
without it diffusers takes the scale as 1. The header key ``diffgraft`` is ours.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.lora import LoraDelta, build

PARTS = ("unet", "text_encoder", "text_encoder_2")
_LEAVES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys look like this dialect."""
    return any(key.endswith(".lora_A.weight") for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """Every key is used, or named in a ValueError."""
    config = _json(header, "lora_adapter_metadata")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        ending = next((end for end in _LEAVES if rest.endswith("." + end)), None)
        if part not in PARTS or ending is None:
            raise ValueError(
                f"its key {key} is no <part>.<module>.lora_A.weight or lora_B.weight with a part of {', '.join(PARTS)}"
            )
        path = f"{part}.{rest.removesuffix('.' + ending).removeprefix('text_model.')}"
        modules.setdefault(path, {})[_LEAVES[ending]] = value
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, leaves in modules.items():
        missing = set(_LEAVES.values()) - set(leaves)
        if missing:
            raise ValueError(f"{path} has only one of its two factors, so half of the file is missing")
        alpha = _alpha(config, path)
        try:
            deltas[path] = (build(leaves, alpha),)
        except ValueError as error:
            raise ValueError(f"the factors of {path} do not fit together: {error}") from error
    ours = _json(header, "diffgraft")
    return Adapter(deltas, ours or {"method": "lora", **_common(deltas)})


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where a module holds something other than one LoRA."""
    if strange := [path for path in adapter.deltas if path.partition(".")[0] not in PARTS]:
        raise ValueError(f"{strange[0]} is in none of {', '.join(PARTS)}, which are all the diffusers layout knows")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in PARTS:
        loras = {
            path.removeprefix(part + "."): found
            for path, found in adapter.deltas.items()
            if path.startswith(part + ".")
        }
        if not loras:
            continue
        level = "" if part == "unet" else "text_model."  # in keys, as every tool expects; not in the header, where
        single: dict[str, LoraDelta] = {}  # peft compares from the end, so that a text encoder of either kind matches
        for path, found in loras.items():
            if len(found) != 1 or not isinstance(found[0], LoraDelta):
                raise ValueError(f"{part}.{path} holds no single LoRA, which is all the diffusers layout can say")
            single[path] = found[0]
        for path, lora in single.items():
            tensors[f"{part}.{level}{path}.lora_A.weight"] = lora.down.contiguous()
            tensors[f"{part}.{level}{path}.lora_B.weight"] = lora.up.contiguous()
        config |= {f"{part}.{key}": value for key, value in _lora_config(single).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    if adapter.metadata:
        header["diffgraft"] = json.dumps(dict(adapter.metadata), sort_keys=True)
    return tensors, header


def _lora_config(loras: Mapping[str, LoraDelta]) -> dict[str, Any]:
    """The fields of peft's LoraConfig that say this: the commonest rank and alpha, and a list of the others."""
    rank = Counter(lora.rank for lora in loras.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in loras.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: lora.rank for path, lora in loras.items() if lora.rank != rank},
        "alpha_pattern": {path: lora.alpha for path, lora in loras.items() if lora.alpha != alpha},
        "target_modules": list(loras),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "peft_type": "LORA",
    }


def _alpha(config: Mapping[str, Any], path: str) -> float | None:
    part, _, inside = path.partition(".")
    if f"{part}.lora_alpha" not in config:
        return None
    if config.get(f"{part}.use_dora") or config.get(f"{part}.use_rslora"):
        raise ValueError(f"{part} was trained with DoRA or rsLoRA, which cannot be read yet")
    pattern = config.get(f"{part}.alpha_pattern") or {}
    # peft matches a pattern against the end of the module's path
    for key, alpha in pattern.items():
        short = key.removeprefix("text_model.")
        if inside == short or inside.endswith("." + short):
            return _number(alpha)
    return _number(config[f"{part}.lora_alpha"])


def _number(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"its header gives {alpha!r} as an alpha, which is no number")
    return float(alpha)


def _common(deltas: Mapping[str, tuple[Delta, ...]]) -> dict[str, Any]:
    first = next(iter(deltas.values()))[0]
    assert isinstance(first, LoraDelta)
    return {"rank": first.rank, "alpha": first.alpha}


def _json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise ValueError(f"its header entry {key!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"its header entry {key!r} holds no JSON object")
    return value
