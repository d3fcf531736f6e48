"""The layout that diffusers and peft write today: ``unet.<module path>.lora_A.weight``.

The forms of `diffusers_legacy` are read too, alone or beside these: diffusers' scripts write some layers in one form
and some in the other. (Diffusers itself goes by the first key then, and loses the rest.)

lora_A [r, in] or [r, in, k, k]; lora_B [out, r] or [out, r, 1, 1]; with DoRA also lora_magnitude_vector [out] or
[1, out, 1, 1]. The header key ``lora_adapter_metadata`` holds
peft's LoraConfig as JSON, its keys prefixed with the part (``unet.r``, ``unet.lora_alpha``, ``unet.rank_pattern``, …);
without it, as older versions do, diffusers takes the scale as 1, so that what is written has the
scale in lora_B, and alpha = r. The header key ``diffgraft`` is ours.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import LEAF as NORMS
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import diffusers_legacy
from diffgraft.adapters.formats.header import number, of_pattern, read_json, read_metadata, write_ours
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.methods.lora import read as build
from diffgraft.adapters.methods.lora import with_alpha
from diffgraft.bases.registry import part_names

METADATA = "lora_adapter_metadata"
OF_UNET = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
"""What paths inside a UNet begin with: keys without a part are its own. (Diffusers passes over such keys.)"""
_LEAVES = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector": NORMS,
    "lora_magnitude_vector.weight": NORMS,
    "magnitude": NORMS,
    "dora_scale": NORMS,
}
_NAMED = re.compile(r"(\.(?:lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$)[\w-]+(?=\.weight$|$)")
"""A leaf with the name that peft gives to the adapter in memory, which `state_dict` of the model leaves in its keys."""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(unnamed(key).endswith(".lora_A.weight") or diffusers_legacy.placed(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key is used, or named in a ValueError."""
    config = read_json(header, METADATA)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _placed(key) or diffusers_legacy.placed(key)
        if found is None:
            expected = f"<part>.<module>.lora_A.weight or lora_B.weight with a part of {', '.join(part_names())}"
            endings = [*(f".{leaf}" for leaf in _LEAVES), *diffusers_legacy.ENDINGS]
            raise UnknownKeyError(key, expected, [f"{part}." for part in part_names()], endings)
        path, leaf = found
        if leaf in modules.setdefault(path, {}):
            raise ValueError(f"its key {key} is the second of that kind for {path}, beside one in another form")
        # of convolutions peft has the lengths of outputs as [1, out, 1, 1], which in other tools are those of inputs
        modules[path][leaf] = value.flatten() if ".lora_magnitude_vector" in key else value
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, leaves in modules.items():
        if not {"lora_down", "lora_up"} <= set(leaves):
            lacking = "lora_B" if "lora_down" in leaves else "lora_A"
            raise ValueError(f"of {path} it has only one of the two factors: {lacking} is missing")
        try:
            deltas[path] = (build(leaves, alpha_of(config, path, leaves["lora_down"].shape[0])),)
        except (ValueError, IndexError) as error:
            raise ValueError(f"the factors of {path} do not fit together: {error}") from error
    return Adapter(deltas, read_metadata(header, method="lora", **_common(deltas)))


def unnamed(key: str) -> str:
    """`key` without the name that peft has given to an adapter in memory, such as ``default``."""
    return _NAMED.sub(r"\1", key)


def _placed(key: str) -> tuple[str, str] | None:
    """The path of the module, as adapters have it, and the leaf that `key` stands for; None where it is no such key."""
    key = unnamed(key)
    part, _, rest = ("unet." + key if key.startswith(OF_UNET) else key).partition(".")
    ending = next((end for end in _LEAVES if rest.endswith("." + end)), None)
    if part not in part_names() or ending is None:
        return None
    return f"{part}.{rest.removesuffix('.' + ending).removeprefix('text_model.')}", _LEAVES[ending]


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header. Raises ValueError where a module holds something other than one LoRA."""
    if strange := [path for path in adapter.deltas if path.partition(".")[0] not in part_names()]:
        raise ValueError(
            f"{strange[0]} is in none of {', '.join(part_names())}, which are all the diffusers layout knows"
        )
    if not adapter.deltas:
        raise ValueError("it holds no weights, which is what the diffusers layout is for; words go into `embedding`")
    if adapter.tokens:
        raise ValueError(
            f"it holds words ({', '.join(adapter.tokens)}), and the diffusers layout is for weights alone: convert the "
            "weights by --only weights, and each word by --only WORD --to embedding"
        )
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in part_names():
        loras = {
            path.removeprefix(part + "."): found
            for path, found in adapter.deltas.items()
            if path.startswith(part + ".")
        }
        if not loras:
            continue
        single: dict[str, FactorDelta] = {}
        for path, found in loras.items():
            delta = found[0]
            if len(found) != 1 or not delta.is_lora or "lora_mid" in delta.leaves:
                kinds = " and ".join(f"{one.kind} (Tucker)" if "lora_mid" in one.leaves else one.kind for one in found)
                raise ValueError(
                    f"the module {part}.{path} has {kinds}, and the diffusers layout holds one plain LoRA for each"
                )
            lora = delta.direction if isinstance(delta, DoraDelta) else delta
            assert isinstance(lora, FactorDelta)
            # older versions of diffusers, OneTrainer and ComfyUI take the scale as 1, whatever the header says
            lora = with_alpha(lora, lora.rank)
            single[path] = lora
            # the level is in keys, as every tool expects it, and not in the header: there peft compares from the end,
            # so that a text encoder of either kind matches
            start = f"{part}.{path if part == 'unet' else add_text_model(path)}"
            tensors[f"{start}.lora_A.weight"] = lora.leaves["lora_down"].contiguous()
            tensors[f"{start}.lora_B.weight"] = lora.leaves["lora_up"].contiguous()
            if isinstance(delta, DoraDelta):
                if delta.of_inputs:
                    raise ValueError(f"{part}.{path} is a DoRA by inputs, and diffusers' layout has them by outputs")
                linear = lora.leaves["lora_down"].ndim == 2
                magnitude = delta.magnitude.flatten() if linear else delta.magnitude.view(1, -1, 1, 1)
                # transformers, which loads the text encoders' part, finds it by the longer name only
                tensors[f"{start}.lora_magnitude_vector.weight"] = magnitude.contiguous()
        config |= {f"{part}.{key}": value for key, value in _lora_config(single).items()}
        config[f"{part}.use_dora"] = any("dora_scale" in found[0].leaves for found in loras.values())
    header = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    return tensors, header | write_ours(adapter)


def _lora_config(loras: Mapping[str, FactorDelta]) -> dict[str, Any]:
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
        "use_rslora": False,
        "peft_type": "LORA",
    }


def alpha_of(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """The alpha whose scale is alpha / rank; None where the header says nothing."""
    part, _, inside = path.partition(".")
    if f"{part}.lora_alpha" not in config:
        return None
    alpha = number(of_pattern(config.get(f"{part}.alpha_pattern"), inside, config[f"{part}.lora_alpha"]))
    return alpha * rank**0.5 if config.get(f"{part}.use_rslora") else alpha


def _common(deltas: Mapping[str, tuple[Delta, ...]]) -> dict[str, Any]:
    first = next(iter(deltas.values()))[0]
    return {"rank": first.leaves["lora_down"].shape[0], "alpha": first.alpha}


def holds_dora_lora(adapter: Adapter) -> bool:
    """Whether it holds LoRAs with DoRA, which most programs misread under kohya's names."""
    first = next(iter(adapter.deltas.values()), (None,))[0]
    return isinstance(first, DoraDelta) and first.is_lora


DIALECT = Dialect(
    name="diffusers",
    summary="the layout of diffusers: LoRA and DoRA",
    order=40,
    recognises=recognises,
    read=read,
    write=write,
    auto=30,
    is_preferred=holds_dora_lora,
    note="webui, ComfyUI, Forge, InvokeAI and sd-scripts do not read diffusers' layout: they need --to kohya.",
)
