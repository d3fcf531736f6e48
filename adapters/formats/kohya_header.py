"""Headers that kohya's tools write into adapter files: see `training_metadata`, which reads them, for the sources."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dora import LEAF as NORMS

_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Family → ``ss_base_model_version``"""
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}
"""Family → ``modelspec.architecture``, without the ending ``/lora``"""
_V_PREDICTION = {"sd2": ("sd_v2_v", "stable-diffusion-v2-768-v")}
"""Family → version and architecture of bases that predict v"""
_SGM = "https://github.com/Stability-AI/generative-models"
"""``modelspec.implementation`` of adapters for XL; for 1.x and 2.x it is ``diffusers``"""
_LORA_MODULE = "networks.lora"
"""Name of sd-scripts' network module for LoRA"""
_LORA_MODULES = {
    "sd3": "networks.lora_sd3",
    "flux1": "networks.lora_flux",
    "flux2-klein": "networks.lora_flux_2",
    "zimage": "networks.lora_zimage",
    "qwen-image": "networks.lora_qwen_image",
}
"""Family of a transformer → network module of sd-scripts or musubi-tuner for LoRA"""
_ALGORITHMS = {"lora": "locon"}
"""Kind of delta → its name in LyCORIS, if it differs"""
_LEGACY_HASH_RANGE = range(0x100000, 0x110000)
"""Bytes of a file that webui's legacy hash is computed from"""


def kohya_header(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Header entries for an adapter, including those that its original file had."""
    entries: dict[str, str] = {
        key: str(value)
        for key, value in (adapter.metadata.get("foreign") or {}).items()
        if key.startswith(("ss_", "modelspec."))
    }
    base = adapter.metadata.get("base") or {}
    family = base.get("family") if isinstance(base, Mapping) else None
    predicts_v = isinstance(base, Mapping) and base.get("prediction_type") == "v_prediction"
    new = dict(_network_module(adapter, _LORA_MODULES.get(str(family), _LORA_MODULE)))
    if not _is_for_lora(new["ss_network_module"]) and _is_for_lora(entries.get("ss_network_module")):
        entries = {key: value for key, value in entries.items() if key not in new}
    for key, name in (("ss_network_dim", "rank"), ("ss_network_alpha", "alpha"), ("ss_seed", "seed")):
        if adapter.metadata.get(name) is not None:
            new[key] = str(adapter.metadata[name])
    if family in _VERSIONS:
        version, architecture = _VERSIONS[family], _ARCHITECTURES[family]
        if predicts_v:
            version, architecture = _V_PREDICTION.get(family, (version, architecture))
        new |= {
            "ss_base_model_version": version,
            "ss_v2": str(family == "sd2"),
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": _SGM if family == "sdxl" else "diffusers",
            "modelspec.resolution": _resolution(family, predicts_v),
            "modelspec.title": str(adapter.metadata.get("trigger") or adapter.method),
            "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        }
    if adapter.metadata.get("trigger"):
        new["modelspec.trigger_phrase"] = str(adapter.metadata["trigger"])
    entries = {**new, **entries}
    return {**entries, **_hashes(tensors, {key: value for key, value in entries.items() if key.startswith("ss_")})}


def _resolution(family: str, predicts_v: bool) -> str:
    side = 1024 if family == "sdxl" else 768 if family == "sd2" and predicts_v else 512
    return f"{side}x{side}"


def _is_for_lora(network_module: str | None) -> bool:
    return network_module in (_LORA_MODULE, *_LORA_MODULES.values())


def _network_module(adapter: Adapter, for_lora: str) -> dict[str, str]:
    """The network module of sd-scripts or LyCORIS that reads everything the adapter holds, and its arguments.

    `for_lora` is the one for plain LoRA, which depends on the family.
    sd-scripts' own module silently ignores the norms of DoRA and the core of a Tucker decomposition.
    """
    deltas = [delta for module_deltas in adapter.deltas.values() for delta in module_deltas]
    kinds = {delta.kind for delta in deltas}
    leaves = {leaf for delta in deltas for leaf in delta.leaves}
    if all(delta.is_lora for delta in deltas) and leaves <= {"lora_down", "lora_up"}:
        return {"ss_network_module": for_lora, "ss_network_args": json.dumps({})}
    kind = next(iter(kinds))
    arguments = {"algo": _ALGORITHMS.get(kind, kind)} if len(kinds) == 1 else {}
    if NORMS in leaves:
        arguments["dora_wd"] = "True"
    if leaves & {"lora_mid", "hada_t1", "lokr_t2"}:
        arguments["use_tucker"] = "True"
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


def _hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """Hashes by which webui indexes LoRA files, computed from the bytes of the tensors in a file with `header`.

    The file, which may be as large as a checkpoint, is not created: its bytes are hashed one tensor at a time.
    """
    whole, window, place = hashlib.sha256(), bytearray(), 0
    for content in _file_contents(tensors, header):
        if place:  # after the JSON header
            whole.update(content)
        window += content[max(0, _LEGACY_HASH_RANGE.start - place) : max(0, _LEGACY_HASH_RANGE.stop - place)]
        place += len(content)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8]}


def _file_contents(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield a safetensors file in pieces: its JSON header preceded by its length, then each tensor's bytes in order.

    The order of tensors is decided by the library, from a file with empty tensors of the same names.
    """
    empty = save({name: torch.empty(0, dtype=value.dtype) for name, value in tensors.items()}, dict(header))
    layout = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    names, end = [name for name in layout if name != "__metadata__"], 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        layout[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        value = tensors[name].detach().cpu().contiguous().flatten()
        yield value.view(torch.uint8).numpy().data
