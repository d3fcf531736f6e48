"""What kohya's tools write into the headers of adapter files, read: ``ss_*``, and Stability's ``modelspec.*``.

webui and others tell by these which base a file is for. All values are strings, some of them JSON.
Sources: sd-scripts 48d368fa, ``train_network.py`` and ``library/sai_model_spec.py``; the model specification 1.0.1 of
Stability AI.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SETTINGS = {
    "seed": "ss_seed",
    "learning_rate": "ss_learning_rate",
    "steps": "ss_steps",
    "optimizer": "ss_optimizer",
    "resolution": "ss_resolution",
    "network_module": "ss_network_module",
    "output_name": "ss_output_name",
    "epoch": "ss_epoch",
    "epochs": "ss_num_epochs",
    "images": "ss_num_train_images",
}
"""What `inspect` shows of them → where it stands."""


_V_PREDICTION = {
    "ss_base_model_version": "sd_v2_v",
    "ss_v_parameterization": "True",
    "modelspec.prediction_type": "v",
}
"""Entry → what it says where the base predicts v"""


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
        if any(header.get(key) == value for key, value in _V_PREDICTION.items()):
            said["base"]["prediction_type"] = "v_prediction"
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


def tags(header: Mapping[str, str]) -> list[tuple[str, int]]:
    """The tags of the captions that a header tells of, each with how often it stood in them, the commonest first."""
    try:
        folders = json.loads(header.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool):
                counts[str(tag).strip()] += count
    return counts.most_common()


def _family(header: Mapping[str, str]) -> str | None:
    version, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    starts = {"sdxl": ("sdxl", "stable-diffusion-xl"), "sd2": ("sd_v2", "stable-diffusion-v2")}
    starts["sd1"] = ("sd_v1", "stable-diffusion-v1")
    for family, (of_version, of_architecture) in starts.items():
        if version.startswith(of_version) or architecture.startswith(of_architecture):
            return family
    return "sd2" if header.get("ss_v2") == "True" else None  # all that kohya's older files say


def _number(text: str | None) -> int | float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    if value != value or abs(value) == float("inf"):
        return None
    return int(value) if value.is_integer() else value
