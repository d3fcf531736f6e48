"""peft's folders: ``adapter_config.json`` and ``adapter_model.safetensors``, in one folder per part of a base.

Keys are ``base_model.model.<module path>.<leaf>``; rank and alpha are in the configuration, which is that of LoRA, LoHa
or LoKr. Several parts are stored in subfolders ``unet``, ``text_encoder`` and ``text_encoder_2``. Text encoders have
the names of transformers 5: the first without the level ``text_model``, the second with it. A folder that does not name
its part belongs to the UNet or the transformer if its layers are those of one, and otherwise to the (first) text
encoder. Layers of a transformer may have names of the original layout too.
Source: peft 0.21.2, ``utils/save_and_load.py`` and ``tuners``.
"""

import json
import re
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
from diffgraft.adapters.formats.diffusers_lora import UNET_STARTS, strip_adapter_name
from diffgraft.adapters.formats.header import finite_number, pattern_value, read_json, read_metadata, write_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.formats.original_names import PART, is_known, is_of_diffusers, read_layers
from diffgraft.adapters.formats.reader import open_file
from diffgraft.adapters.method import add_text_model
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.registry import part_names
from diffgraft.files import write_safetensors, write_text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OLD_WEIGHTS = "adapter_model.bin"
"""Name of the weights in peft before 0.7, a pickle, which is opened with ``weights_only=True``"""
_START = "base_model.model."
_LEAF = re.compile(r"\.(?:lora|hada|lokr)_.+")
"""End of a key, from its leaf on"""
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
    """Read the tensors and headers of all files in a folder written by peft; None if `path` is not such a folder.

    If there are subfolders for several parts, keys begin with their part. The configuration becomes the header entry
    `CONFIG`.
    """
    folders = {part: path / part for part in ("", *part_names()) if (path / part / CONFIG).is_file()}
    if "" in folders:
        folders = {"": path}
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for part, folder in folders.items():
        part_tensors, part_header = open_file(_weights_in(folder))
        prefix = f"{part}." if part else ""
        tensors |= {f"{prefix}{key}": value for key, value in part_tensors.items()}
        header |= {**part_header, f"{prefix}{CONFIG}": (folder / CONFIG).read_text("utf-8", errors="replace")}
    return (tensors, header) if folders else None


def _weights_in(folder: Path) -> Path:
    """Path of the weights in a folder, under today's name or that of older versions of peft."""
    old = folder / _OLD_WEIGHTS
    return old if old.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
    """Whether a key contains peft's prefix ``base_model.model.``.

    A file of a transformer's layers without a configuration is left to `dotted`: other tools write such files, in which
    the scale is 1.
    """
    found = [key.partition(_START)[2] for key in tensors if _START in key]
    has_config = any(key.endswith(CONFIG) for key in header)
    return bool(found) and (has_config or not any(is_known(_layer_name(rest)) for rest in found))


def _layer_name(rest: str) -> str:
    """Name of a layer in a transformer, from a key without its prefix."""
    return _LEAF.sub("", rest).removeprefix("diffusion_model.").removeprefix("transformer.")


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError for an unknown key, a missing configuration, or invalid leaves."""
    modules: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, has_prefix, rest = key.partition(_START)
        rest = strip_adapter_name(rest)
        ending = next((end for end in sorted(_LEAVES, key=len, reverse=True) if rest.endswith("." + end)), None)
        if not has_prefix or ending is None:
            expected = f"{_START}<module>.<leaf> of peft's LoRA, LoHa or LoKr"
            raise UnknownKeyError(key, expected, [f"{part}{_START}"], [f".{leaf}" for leaf in _LEAVES])
        leaves = modules.setdefault((part, rest.removesuffix("." + ending)), {})
        if _LEAVES[ending] in leaves:
            raise ValueError(f"the key {key} repeats the leaf {_LEAVES[ending]} of its module")
        leaves[_LEAVES[ending]] = value
    deltas: dict[str, tuple[Delta, ...]] = {}
    configs = {part: _config(header, part) for part, _ in modules}
    for (part, inside), leaves in modules.items():
        path = f"{part or _part_of(inside)}{inside}".replace(".text_model.", ".", 1)
        if path in deltas:
            raise ValueError(f"it holds {path} twice, under two names")
        try:
            deltas[path] = (_read_module(inside, leaves, configs[part]),)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is invalid: {error}") from error
    deltas = _with_diffusers_names(deltas)
    other_entries = {key: value for key, value in header.items() if not key.endswith(CONFIG)}
    kinds = {delta.kind for module_deltas in deltas.values() for delta in module_deltas}
    return Adapter(deltas, read_metadata(other_entries, method=next(iter(kinds)) if len(kinds) == 1 else "mixed"))


def _part_of(inside: str) -> str:
    """The part, with a dot, of a layer in a folder that does not name its part."""
    if inside.startswith(UNET_STARTS):
        return "unet."
    return f"{PART}." if is_known(inside) else "text_encoder."


def _with_diffusers_names(deltas: Mapping[str, tuple[Delta, ...]]) -> dict[str, tuple[Delta, ...]]:
    """Rename, and split, layers of a transformer that have names of the original layout."""
    inside = {path: path.removeprefix(f"{PART}.") for path in deltas if path.startswith(f"{PART}.")}
    if all(map(is_of_diffusers, inside.values())):
        return dict(deltas)
    layers = read_layers({path: (name, deltas[path]) for path, name in inside.items()}).layers
    renamed: dict[str, tuple[Delta, ...]] = {}
    for path, own in deltas.items():
        for name, changed in layers.get(path, [(path, own)]):
            renamed[f"{PART}.{name}" if path in layers else name] = changed
    return renamed


def _config(header: Mapping[str, str], part: str) -> dict[str, Any]:
    if f"{part}{CONFIG}" not in header:
        raise ValueError(f"there is no {CONFIG} beside it, which holds peft's alpha: pass the folder")
    config = read_json(header, f"{part}{CONFIG}")
    if str(config.get("peft_type")) not in _KINDS:
        raise ValueError(f"it is of peft's type {config.get('peft_type')}; supported are {', '.join(_KINDS)}")
    return config


def _read_module(inside: str, leaves: dict[str, Tensor], config: Mapping[str, Any]) -> Delta:
    """Build the delta of the module at the path `inside` its part, with alpha and rank from peft's configuration."""
    kind = _KINDS[config["peft_type"]]
    alpha = pattern_value(config.get("alpha_pattern"), inside, config.get("lora_alpha", config.get("alpha")))
    alpha = finite_number(alpha)
    if NORMS in leaves:
        leaves[NORMS] = leaves[NORMS].flatten()
    delta = read_delta(kind, leaves, alpha)
    if config.get("use_rslora"):
        alpha *= _factors(delta).rank ** 0.5
    if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(leaves):
        rank = finite_number(pattern_value(config.get("rank_pattern"), inside, config.get("r")), "rank")
        if rank <= 0:
            raise ValueError(f"its configuration has the rank {rank:g}; expected a positive number")
        # unsplit factors have no scale here, so peft's scale is multiplied into one of them
        return read_delta(kind, {**leaves, "lokr_w1": leaves["lokr_w1"] * (alpha / rank)}, None)
    return read_delta(kind, leaves, alpha)


def _factors(delta: Delta) -> FactorDelta:
    """The factors of a delta, which is a DoRA or made of factors itself."""
    factors = delta.direction if isinstance(delta, DoraDelta) else delta
    assert isinstance(factors, FactorDelta)
    return factors


def suffix(adapter: Adapter) -> str:  # noqa: ARG001  (all are folders)
    """Empty suffix, as the result is a folder."""
    return ""


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header in the form of `open_folder`. Raises ValueError for contents that peft cannot hold."""
    if not adapter.deltas:
        raise ValueError("it holds no weights, which peft's folders require")
    if adapter.tokens:
        raise ValueError(f"it holds words ({', '.join(adapter.tokens)}), but peft's folders hold only weights")
    names = [part for part in part_names() if any(path.startswith(f"{part}.") for path in adapter.deltas)]
    parts = {part: _write(adapter, part) for part in names}
    if unknown := [path for path in adapter.deltas if path.partition(".")[0] not in part_names()]:
        raise ValueError(f"{unknown[0]} is not in {', '.join(part_names())}")
    tensors: dict[str, Tensor] = {}
    header = {"format": "pt", **write_metadata(adapter)}
    # a single folder does not name its part; it is read as the UNet's if all layers have names of a UNet's layers
    has_prefixes = set(parts) != {"unet"} or not all(
        path.removeprefix("unet.").startswith(UNET_STARTS) for path in adapter.deltas
    )
    for part, (part_tensors, config) in parts.items():
        prefix = f"{part}." if has_prefixes else ""
        tensors |= {f"{prefix}{key}": value for key, value in part_tensors.items()}
        header[f"{prefix}{CONFIG}"] = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
    return tensors, header


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write a folder atomically, and return its path. Raises ValueError if `path` exists, or ends in .safetensors."""
    if path.suffix == ".safetensors" or path.exists():
        raise ValueError(f"peft's format is a folder: give the name of a new folder instead of {path}")
    partial = path.with_name(f".{path.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    common = {key: value for key, value in header.items() if not key.endswith(CONFIG)}
    try:
        for config in sorted(header.keys() - common.keys()):
            prefix = config.removesuffix(CONFIG)
            folder = partial / prefix.removesuffix(".")
            part_tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            write_safetensors(folder / WEIGHTS, part_tensors, common)
            write_text(folder / CONFIG, header[config])
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write(adapter: Adapter, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of one part."""
    by_path: dict[str, Delta] = {}
    for path, deltas in adapter.deltas.items():
        if path.startswith(f"{part}."):
            if len(deltas) != 1:
                raise ValueError(f"{path} holds {len(deltas)} deltas, but peft allows only one per layer")
            inside = path.removeprefix(f"{part}.")
            by_path[add_text_model(inside) if part == "text_encoder_2" else inside] = deltas[0]
    kinds = {delta.kind for delta in by_path.values()}
    if len(kinds) != 1 or not kinds <= set(_KINDS.values()):
        raise ValueError(f"{part} holds {', '.join(sorted(kinds))}; a folder of peft's holds LoRA, LoHa or LoKr")
    kind = next(iter(kinds))
    factors = {path: _factors(delta) for path, delta in by_path.items()}
    if any("lora_mid" in delta.leaves for delta in by_path.values()):
        raise ValueError("peft's LoRA has no Tucker variant")
    if any(isinstance(delta, DoraDelta) and not delta.is_lora for delta in by_path.values()):
        raise ValueError("peft supports DoRA only for LoRA")
    ranks = {path: delta.rank for path, delta in factors.items()}
    alphas = {path: delta.alpha for path, delta in factors.items()}
    more: dict[str, Any] = {}
    if kind == "lora":
        more = {"use_dora": any(isinstance(delta, DoraDelta) for delta in by_path.values()), "bias": "none"}
    elif kind == "loha":
        more = {"use_effective_conv2d": any("hada_t1" in delta.leaves for delta in by_path.values())}
    else:
        ranks, alphas, more = peft_lokr.lokr_config(factors)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha" if kind == "lora" else "alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": list(by_path),
        "inference_mode": True,
        **more,
    }
    names = {ours: theirs for theirs, ours in reversed(_LEAVES.items())}
    tensors: dict[str, Tensor] = {}
    for path, delta in by_path.items():
        for name, leaf in delta.leaves.items():
            if name == NORMS:
                if isinstance(delta, DoraDelta) and delta.has_input_norms:
                    raise ValueError(f"{path} is a DoRA with norms of the inputs; peft's DoRA has norms of the outputs")
                leaf = leaf.flatten() if delta.leaves["lora_down"].ndim == 2 else leaf.view(1, -1, 1, 1)
            tensors[f"{_START}{path}.{names[name]}"] = leaf.contiguous()
    return tensors, _complete_config(kind, config)


def _complete_config(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with all keys of peft's own class, which validates it."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    complete: dict[str, Any] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())](**config).to_dict()
    return complete


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
