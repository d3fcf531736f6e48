"""Today's layout of diffusers and peft: ``unet.<module path>.lora_A.weight``.

The key names of `diffusers_legacy` are read too, alone or mixed with these, as diffusers' scripts write some layers in
one form and some in the other. (Diffusers itself decides by the first key, and drops the rest.)

lora_A [r, in] or [r, in, k, k]; lora_B [out, r] or [out, r, 1, 1]; with DoRA also lora_magnitude_vector [out] or
[1, out, 1, 1]. The header key ``lora_adapter_metadata`` holds peft's LoraConfig as JSON, with keys prefixed by the part
(``unet.r``, ``unet.lora_alpha``, ``unet.rank_pattern``, …). Without it, and in older versions always, diffusers assumes
a scale of 1, so written files have the scale in lora_B, and alpha = r. The header key ``diffgraft`` holds the project's
own metadata.
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
from diffgraft.adapters.formats.header import finite_number, pattern_value, read_json, read_metadata, write_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.original_names import is_for_transformer
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.methods.lora import read as build
from diffgraft.adapters.methods.lora import with_alpha
from diffgraft.bases.registry import part_names

METADATA = "lora_adapter_metadata"
UNET_STARTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
"""Beginnings of paths inside a UNet; a key without a part that begins with one is the UNet's (diffusers ignores it)"""
_LEAVES = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector": NORMS,
    "lora_magnitude_vector.weight": NORMS,
    "magnitude": NORMS,
    "dora_scale": NORMS,
}
_ADAPTER_NAME = re.compile(
    r"(\.(?:lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$)[\w-]+(?=\.weight$|$)"
)
"""A leaf followed by the name that peft gives to an adapter in memory, as in the keys of the model's `state_dict`"""


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(strip_adapter_name(key).endswith(".lora_A.weight") or diffusers_legacy.parse_key(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError for an unknown key, or for factors that do not fit together."""
    config = read_json(header, METADATA)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parsed = _parse_key(key) or diffusers_legacy.parse_key(key)
        if parsed is None:
            expected = (
                f"<part>.<module>.lora_A.weight or lora_B.weight, where <part> is one of {', '.join(part_names())}"
            )
            endings = [*(f".{leaf}" for leaf in _LEAVES), *diffusers_legacy.ENDINGS]
            raise UnknownKeyError(key, expected, [f"{part}." for part in part_names()], endings)
        path, leaf = parsed
        if leaf in modules.setdefault(path, {}):
            raise ValueError(f"the key {key} repeats the leaf {leaf} of {path}, which an earlier key has")
        # peft stores the norms of a convolution's outputs as [1, out, 1, 1], which means input norms in other tools
        modules[path][leaf] = value.flatten() if ".lora_magnitude_vector" in key else value
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, leaves in modules.items():
        if not {"lora_down", "lora_up"} <= set(leaves):
            missing = "lora_B" if "lora_down" in leaves else "lora_A"
            raise ValueError(f"{path} has only one of the two factors: {missing} is missing")
        try:
            deltas[path] = (build(leaves, alpha_of(config, path, leaves["lora_down"].shape[0])),)
        except (ValueError, IndexError) as error:
            raise ValueError(f"the factors of {path} do not fit together: {error}") from error
    return Adapter(deltas, read_metadata(header, method="lora", **_rank_and_alpha(deltas)))


def strip_adapter_name(key: str) -> str:
    """Remove from `key` the name that peft gives to an adapter in memory, such as ``default``."""
    return _ADAPTER_NAME.sub(r"\1", key)


def _parse_key(key: str) -> tuple[str, str] | None:
    """Module path (as in `Adapter.deltas`) and leaf name of `key`; None if the key is not of this form."""
    key = strip_adapter_name(key)
    part, _, rest = ("unet." + key if key.startswith(UNET_STARTS) else key).partition(".")
    ending = next((end for end in _LEAVES if rest.endswith("." + end)), None)
    if part not in part_names() or ending is None:
        return None
    return f"{part}.{rest.removesuffix('.' + ending).removeprefix('text_model.')}", _LEAVES[ending]


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header. Raises ValueError for contents that the layout cannot hold."""
    if unknown := [path for path in adapter.deltas if path.partition(".")[0] not in part_names()]:
        raise ValueError(f"{unknown[0]} is not in {', '.join(part_names())}, the parts that the diffusers layout has")
    if not adapter.deltas:
        raise ValueError("it holds no weights, which the diffusers layout requires; words are written by `embedding`")
    if adapter.tokens:
        raise ValueError(
            f"it holds words ({', '.join(adapter.tokens)}), but the diffusers layout holds only weights: convert the "
            "weights with --only weights, and each word with --only WORD --to embedding"
        )
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in part_names():
        prefix = f"{part}."
        loras = {
            path.removeprefix(prefix): deltas for path, deltas in adapter.deltas.items() if path.startswith(prefix)
        }
        if not loras:
            continue
        single: dict[str, FactorDelta] = {}
        for path, deltas in loras.items():
            delta = deltas[0]
            if len(deltas) != 1 or not delta.is_lora or "lora_mid" in delta.leaves:
                kinds = " and ".join(f"{d.kind} (Tucker)" if "lora_mid" in d.leaves else d.kind for d in deltas)
                raise ValueError(
                    f"{part}.{path} has {kinds}, but the diffusers layout holds only one plain LoRA per module"
                )
            lora = delta.direction if isinstance(delta, DoraDelta) else delta
            assert isinstance(lora, FactorDelta)
            # older versions of diffusers, OneTrainer and ComfyUI assume a scale of 1, whatever the header says
            lora = with_alpha(lora, lora.rank)
            single[path] = lora
            # keys have the level text_model, as every tool expects, but the header does not: peft matches its paths
            # from the end, so that text encoders with and without the level match
            name = f"{part}.{path if part == 'unet' else add_text_model(path)}"
            tensors[f"{name}.lora_A.weight"] = lora.leaves["lora_down"].contiguous()
            tensors[f"{name}.lora_B.weight"] = lora.leaves["lora_up"].contiguous()
            if isinstance(delta, DoraDelta):
                if delta.has_input_norms:
                    raise ValueError(
                        f"{part}.{path} is a DoRA with norms of the inputs; the diffusers layout has those of outputs"
                    )
                linear = lora.leaves["lora_down"].ndim == 2
                magnitude = delta.magnitude.flatten() if linear else delta.magnitude.view(1, -1, 1, 1)
                # transformers, which loads the part for text encoders, finds only the longer name
                tensors[f"{name}.lora_magnitude_vector.weight"] = magnitude.contiguous()
        config |= {f"{part}.{key}": value for key, value in _lora_config(single).items()}
        config[f"{part}.use_dora"] = any("dora_scale" in deltas[0].leaves for deltas in loras.values())
    header = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    return tensors, header | write_metadata(adapter)


def _lora_config(loras: Mapping[str, FactorDelta]) -> dict[str, Any]:
    """Fields of peft's LoraConfig for these LoRAs: the most frequent rank and alpha, and patterns for all others."""
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
    """Alpha of the module at `path`, such that its scale is alpha / rank; None if the header does not say."""
    part, _, inside = path.partition(".")
    if f"{part}.lora_alpha" not in config:
        return None
    alpha = finite_number(pattern_value(config.get(f"{part}.alpha_pattern"), inside, config[f"{part}.lora_alpha"]))
    return alpha * rank**0.5 if config.get(f"{part}.use_rslora") else alpha


def _rank_and_alpha(deltas: Mapping[str, tuple[Delta, ...]]) -> dict[str, Any]:
    """Rank and alpha of the first module, for the metadata of files whose header does not say them."""
    first = next(iter(deltas.values()))[0]
    return {"rank": first.leaves["lora_down"].shape[0], "alpha": first.alpha}


def is_best_in_diffusers(adapter: Adapter) -> bool:
    """Whether other programs read an adapter best in this layout, as kohya's names would be worse.

    Those are LoRAs with DoRA, told by the first module, which most programs misread in kohya's names, and adapters for
    transformers: kohya's names join queries, keys and values, and ComfyUI reads both.
    """
    first = next(iter(adapter.deltas.values()), (None,))[0]
    return (isinstance(first, DoraDelta) and first.is_lora) or is_for_transformer(adapter)


DIALECT = Dialect(
    name="diffusers",
    summary="the layout of diffusers: LoRA and DoRA",
    order=40,
    recognises=recognises,
    read=read,
    write=write,
    auto=30,
    is_preferred=is_best_in_diffusers,
    note=(
        "webui, Forge, InvokeAI and sd-scripts do not read diffusers' layout: they need --to kohya. ComfyUI reads it "
        "only for transformers."
    ),
)
