"""peft's folders: ``adapter_config.json`` and ``adapter_model.safetensors``, one folder for each part of a base.

Keys are ``base_model.model.<module path>.<leaf>``; rank and alpha stand in the configuration, which is that of LoRA,
LoHa or LoKr. Several parts lie in folders ``unet``, ``text_encoder`` and ``text_encoder_2`` of one folder. Text
encoders are named as transformers 5 has them: the first without the level ``text_model``, the second with it. A folder
that does not say its part is of the UNet where its layers are the UNet's, and else of the (first) text encoder.
Source: peft 0.21.2, ``utils/save_and_load.py`` and ``tuners``.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import LEAF as NORMS
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats import peft_lokr
from diffgraft.adapters.formats.diffusers_lora import OF_UNET, unnamed
from diffgraft.adapters.formats.header import number, of_pattern, read_json, read_metadata, write_ours
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.registry import part_names
from diffgraft.files import write_safetensors, write_text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OLD_WEIGHTS = "adapter_model.bin"
"""The file that peft before 0.7 wrote, a pickle: opened for weights alone."""
_START = "base_model.model."
_KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_LEAVES = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector": NORMS,
    "lora_magnitude_vector.weight": NORMS,
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}


def open_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and header of all files in a folder of peft's; None where `path` is no such folder.

    Keys begin with their part, where there are folders for several. The configuration is the header's entry `CONFIG`.
    """
    folders = {part: path / part for part in ("", *part_names()) if (path / part / CONFIG).is_file()}
    if "" in folders:
        folders = {"": path}
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for part, folder in folders.items():
        held, said = open_file(_weights_in(folder))
        start = f"{part}." if part else ""
        tensors |= {f"{start}{key}": value for key, value in held.items()}
        header |= {**said, f"{start}{CONFIG}": (folder / CONFIG).read_text("utf-8", errors="replace")}
    return (tensors, header) if folders else None


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: today's, or the one that peft wrote before."""
    old = folder / _OLD_WEIGHTS
    return old if old.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_START in key for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key is used, or named in a ValueError."""
    modules: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, found, rest = key.partition(_START)
        rest = unnamed(rest)
        ending = next((end for end in sorted(_LEAVES, key=len, reverse=True) if rest.endswith("." + end)), None)
        if not found or ending is None:
            expected = f"{_START}<module>.<leaf> of peft's LoRA, LoHa or LoKr"
            raise UnknownKeyError(key, expected, [f"{part}{_START}"], [f".{leaf}" for leaf in _LEAVES])
        leaves = modules.setdefault((part, rest.removesuffix("." + ending)), {})
        if _LEAVES[ending] in leaves:
            raise ValueError(f"its key {key} is the second of that kind for its module")
        leaves[_LEAVES[ending]] = value
    deltas: dict[str, tuple[Delta, ...]] = {}
    configs = {part: _config(header, part) for part, _ in modules}
    for (part, inside), leaves in modules.items():
        path = f"{part or ('unet.' if inside.startswith(OF_UNET) else 'text_encoder.')}{inside}"
        path = path.replace(".text_model.", ".", 1)
        if path in deltas:
            raise ValueError(f"{path} stands in it twice, under two names")
        try:
            deltas[path] = (_read_one(inside, leaves, configs[part]),)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"in its module {path}, {error}") from error
    left = {key: value for key, value in header.items() if not key.endswith(CONFIG)}
    kinds = {delta.kind for found in deltas.values() for delta in found}
    return Adapter(deltas, read_metadata(left, method=next(iter(kinds)) if len(kinds) == 1 else "mixed"))


def _config(header: Mapping[str, str], part: str) -> dict[str, Any]:
    if f"{part}{CONFIG}" not in header:
        raise ValueError(f"there is no {CONFIG} beside it, in which peft keeps the alpha: give the folder")
    config = read_json(header, f"{part}{CONFIG}")
    if str(config.get("peft_type")) not in _KINDS:
        raise ValueError(f"it is peft's {config.get('peft_type')}; read are {', '.join(_KINDS)}")
    return config


def _read_one(inside: str, leaves: dict[str, Tensor], config: Mapping[str, Any]) -> Delta:
    kind = _KINDS[config["peft_type"]]
    alpha = number(of_pattern(config.get("alpha_pattern"), inside, config.get("lora_alpha", config.get("alpha"))))
    if NORMS in leaves:
        leaves[NORMS] = leaves[NORMS].flatten()
    delta = read_delta(kind, leaves, alpha)
    if config.get("use_rslora"):
        alpha *= _factors(delta).rank ** 0.5
    if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(leaves):
        rank = number(of_pattern(config.get("rank_pattern"), inside, config.get("r")), "rank")
        if rank <= 0:
            raise ValueError(f"its configuration has the rank {rank:g}")
        return read_delta(kind, {**leaves, "lokr_w1": leaves["lokr_w1"] * (alpha / rank)}, None)  # no scale of its own
    return read_delta(kind, leaves, alpha)


def _factors(delta: Delta) -> FactorDelta:
    factors = delta.direction if isinstance(delta, DoraDelta) else delta
    assert isinstance(factors, FactorDelta)
    return factors


def suffix(adapter: Adapter) -> str:  # noqa: ARG001  (all are folders)
    """Nothing, as it is a folder."""
    return ""


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header as `open_folder` returns them. Raises ValueError where peft has no place for something."""
    if not adapter.deltas:
        raise ValueError("it holds no weights, which is what peft's folders are for")
    if adapter.tokens:
        raise ValueError(f"it holds words ({', '.join(adapter.tokens)}), and peft's folders are for weights alone")
    names = [part for part in part_names() if any(path.startswith(f"{part}.") for path in adapter.deltas)]
    parts = {part: _write(adapter, part) for part in names}
    if strange := [found for found in adapter.deltas if found.partition(".")[0] not in part_names()]:
        raise ValueError(f"{strange[0]} is in none of {', '.join(part_names())}")
    tensors: dict[str, Tensor] = {}
    header = {"format": "pt", **write_ours(adapter)}
    # one folder alone does not say its part: it is read as the UNet's where all layers have names of a UNet's
    says_part = set(parts) != {"unet"} or not all(p.removeprefix("unet.").startswith(OF_UNET) for p in adapter.deltas)
    for part, (held, config) in parts.items():
        start = f"{part}." if says_part else ""
        tensors |= {f"{start}{key}": value for key, value in held.items()}
        header[f"{start}{CONFIG}"] = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
    return tensors, header


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write a folder, whole or not at all. Raises ValueError where `path` cannot be the name of a new one."""
    if path.suffix == ".safetensors" or path.exists():
        raise ValueError(f"peft writes a folder: give the name of a new one in the place of {path}")
    partial = path.with_name(f".{path.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    common = {key: value for key, value in header.items() if not key.endswith(CONFIG)}
    try:
        for config in sorted(header.keys() - common.keys()):
            start = config.removesuffix(CONFIG)
            folder = partial / start.removesuffix(".")
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            write_safetensors(folder / WEIGHTS, own, common)
            write_text(folder / CONFIG, header[config])
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write(adapter: Adapter, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of one part."""
    found: dict[str, Delta] = {}
    for path, deltas in adapter.deltas.items():
        if path.startswith(f"{part}."):
            if len(deltas) != 1:
                raise ValueError(f"{path} holds {len(deltas)} deltas, and peft has one for each layer")
            inside = path.removeprefix(f"{part}.")
            found[add_text_model(inside) if part == "text_encoder_2" else inside] = deltas[0]
    kinds = {delta.kind for delta in found.values()}
    if len(kinds) != 1 or not kinds <= set(_KINDS.values()):
        raise ValueError(f"{part} holds {', '.join(sorted(kinds))}; a folder of peft's is of LoRA, LoHa or LoKr")
    kind = next(iter(kinds))
    factors = {path: _factors(delta) for path, delta in found.items()}
    if any("lora_mid" in delta.leaves for delta in found.values()):
        raise ValueError("peft's LoRA has no Tucker variant")
    if any(isinstance(delta, DoraDelta) and not delta.is_lora for delta in found.values()):
        raise ValueError("peft has DoRA for LoRA alone")
    ranks = {path: delta.rank for path, delta in factors.items()}
    alphas = {path: delta.alpha for path, delta in factors.items()}
    more: dict[str, Any] = {}
    if kind == "lora":
        more = {"use_dora": any(isinstance(delta, DoraDelta) for delta in found.values()), "bias": "none"}
    elif kind == "loha":
        more = {"use_effective_conv2d": any("hada_t1" in delta.leaves for delta in found.values())}
    else:
        ranks, alphas, more = peft_lokr.settings(factors)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha" if kind == "lora" else "alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": list(found),
        "inference_mode": True,
        **more,
    }
    names = {ours: theirs for theirs, ours in reversed(_LEAVES.items())}
    tensors: dict[str, Tensor] = {}
    for path, delta in found.items():
        for name, leaf in delta.leaves.items():
            if name == NORMS:
                if isinstance(delta, DoraDelta) and delta.of_inputs:
                    raise ValueError(f"{path} is a DoRA by inputs, and peft has them by outputs")
                leaf = leaf.flatten() if delta.leaves["lora_down"].ndim == 2 else leaf.view(1, -1, 1, 1)
            tensors[f"{_START}{path}.{names[name]}"] = leaf.contiguous()
    return tensors, _whole(kind, config)


def _whole(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with all of the keys that peft's own class has, checked by it."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    whole: dict[str, Any] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())](**config).to_dict()
    return whole


DIALECT = Dialect(
    name="peft",
    summary="folders of peft's: LoRA, DoRA, LoHa, LoKr",
    order=20,
    recognises=recognises,
    read=read,
    write=write,
    store=store,
    open=open_folder,
    suffix=suffix,
    note="Programs that draw do not open peft's folders, which are for peft itself: for those use --to kohya.",
)
