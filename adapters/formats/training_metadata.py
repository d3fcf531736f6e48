"""What kohya's tools write into the headers of adapter files: ``ss_*``, and Stability's ``modelspec.*``.

webui and others tell by these which base a file is for. All values are strings, some of them JSON.
Sources: sd-scripts 48d368fa, ``train_network.py`` and ``library/sai_model_spec.py``; the model specification 1.0.1 of
Stability AI.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.files import apart

_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Family → ``ss_base_model_version``."""
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}
"""Family → ``modelspec.architecture``, before ``/lora``."""
_V_PREDICTION = {"sd2": ("sd_v2_v", "stable-diffusion-v2-768-v")}
"""Family → version and architecture where it predicts v."""
_SGM = "https://github.com/Stability-AI/generative-models"
"""``modelspec.implementation`` of adapters for XL; those for 1.x and 2.x have ``diffusers``."""
_SETTINGS = {
    "seed": "ss_seed",
    "learning_rate": "ss_learning_rate",
    "steps": "ss_steps",
    "optimizer": "ss_optimizer",
    "resolution": "ss_resolution",
    "network_module": "ss_network_module",
}
"""What `inspect` shows of them → where it stands."""


def read_training(header: Mapping[str, str]) -> dict[str, Any]:
    """What the header says in these keys, under the names that this project has for it; empty where it has none."""
    said: dict[str, Any] = {}
    for name, key in (("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"), ("seed", "ss_seed")):
        if (value := _number(header.get(key))) is not None:
            said[name] = value
    family = _family(header)
    if family:
        name = header.get("ss_sd_model_name") or header.get("ss_base_model_version", "–")
        said["base"] = {"family": family, "name": name}
    if phrase := header.get("modelspec.trigger_phrase"):
        said["trigger"] = phrase
    return said


_OF_NETWORK = re.compile(
    r"ss_(network_.+|output_name|session_id|training_(started|finished)_at|new_sd_model_hash|scale_weight_norms"
    r"|dim_from_weights|lowram)|sshs_.+|modelspec\.(title|date|hash_.+|sai_model_spec|implementation|architecture)"
)
"""Entries about the network in the file, or that one file, which are another's after it was changed."""
_COUNTED = ("ss_tag_frequency", "ss_dataset_dirs")
"""Entries with JSON objects of folders, of which several adapters together have all."""


def still_true(foreign: Any) -> dict[str, str]:
    """Header entries that stay true of an adapter of other factors: of pictures and the settings of the training."""
    entries = foreign.items() if isinstance(foreign, Mapping) else ()
    return {str(key): str(value) for key, value in entries if not _OF_NETWORK.fullmatch(str(key))}


def of_all(entries: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Header entries that are true of adapters together: those all agree in, and the folders and tags of each."""
    first, *others = entries
    kept = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    for key in _COUNTED:
        if merged := _merged([entry[key] for entry in entries if key in entry]):
            kept[key] = merged
    return kept


def _merged(texts: Sequence[str]) -> str:
    """JSON objects by folder as one; of a folder that several have, the first's. Empty where there are none."""
    together: dict[str, Any] = {}
    for text in texts:
        try:
            folders = json.loads(text)
        except (ValueError, RecursionError):
            continue
        together = {**folders, **together} if isinstance(folders, dict) else together
    return json.dumps(together) if together else ""


def training_settings(header: Mapping[str, str]) -> dict[str, str]:
    """The settings of a training run that a header tells of, by short names."""
    found = {name: header[key] for name, key in _SETTINGS.items() if header.get(key) not in (None, "", "None")}
    return found | {key: value for key, value in header.items() if key.startswith("modelspec.") and value}


def write_training(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Header entries for an adapter; those that its own file had come along."""
    said: dict[str, str] = {
        key: str(value)
        for key, value in (adapter.metadata.get("foreign") or {}).items()
        if key.startswith(("ss_", "modelspec."))
    }
    of_base = adapter.metadata.get("base") or {}
    family = of_base.get("family") if isinstance(of_base, Mapping) else None
    predicts_v = isinstance(of_base, Mapping) and of_base.get("prediction_type") == "v_prediction"
    kinds = {delta.kind for found in adapter.deltas.values() for delta in found}
    module = "networks.lora" if kinds == {"lora"} else "lycoris.kohya"
    new = {"ss_network_module": module, "ss_network_args": json.dumps({} if kinds == {"lora"} else _arguments(kinds))}
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
    said = {**new, **said}
    return {**said, **_hashes(tensors, {key: value for key, value in said.items() if key.startswith("ss_")})}


def _resolution(family: str, predicts_v: bool) -> str:
    side = 1024 if family == "sdxl" else 768 if family == "sd2" and predicts_v else 512
    return f"{side}x{side}"


def _arguments(kinds: set[str]) -> dict[str, str]:
    """What LyCORIS is told; a mixture has no name there."""
    return {"algo": next(iter(kinds))} if len(kinds) == 1 else {}


def _hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """What webui indexes its LoRA files by: of the tensors' bytes alone, as a file with `header` has them."""
    content = save(apart(tensors), dict(header))
    start = 8 + int.from_bytes(content[:8], "little")
    legacy = content[0x100000 : 0x100000 + 0x10000]
    return {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _family(header: Mapping[str, str]) -> str | None:
    version, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    starts = {"sdxl": ("sdxl", "stable-diffusion-xl"), "sd2": ("sd_v2", "stable-diffusion-v2")}
    starts["sd1"] = ("sd_v1", "stable-diffusion-v1")
    for family, (of_version, of_architecture) in starts.items():
        if version.startswith(of_version) or architecture.startswith(of_architecture):
            return family
    return None


def _number(text: str | None) -> int | float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    if value != value or abs(value) == float("inf"):
        return None
    return int(value) if value.is_integer() else value
