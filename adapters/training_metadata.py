"""Reading of training metadata in adapter file headers: kohya's ``ss_*`` keys, and Stability AI's ``modelspec.*``.

webui and other programs use these keys to tell which base a file is for. All values are strings, some of them JSON.
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
"""Name of a setting, as `inspect` shows it → its header key"""


_V_PREDICTION = {
    "ss_base_model_version": "sd_v2_v",
    "ss_v_parameterization": "True",
    "modelspec.prediction_type": "v",
}
"""Header key → its value if the base predicts v"""


def read_training(header: Mapping[str, str]) -> dict[str, Any]:
    """Translate these header entries into the project's metadata: rank, alpha, seed, base, trigger; may be empty."""
    metadata: dict[str, Any] = {}
    for name, key in (("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"), ("seed", "ss_seed")):
        if (value := _number(header.get(key))) is not None:
            metadata[name] = value
    family = _family(header)
    if family:
        name = header.get("ss_sd_model_name") or header.get("ss_base_model_version", "–")
        metadata["base"] = {"family": family, "name": name}
        if any(header.get(key) == value for key, value in _V_PREDICTION.items()):
            metadata["base"]["prediction_type"] = "v_prediction"
    if phrase := header.get("modelspec.trigger_phrase"):
        metadata["trigger"] = phrase
    return metadata


_FILE_ENTRIES = re.compile(
    r"ss_(network_.+|output_name|session_id|training_(started|finished)_at|new_sd_model_hash|scale_weight_norms"
    r"|dim_from_weights|lowram)|sshs_.+|modelspec\.(title|date|hash_.+|sai_model_spec|implementation|architecture)"
)
"""Entries about one file and the network in it, which are no longer true once the adapter was changed"""
_FOLDER_ENTRIES = ("ss_tag_frequency", "ss_dataset_dirs")
"""Entries with a JSON object by folder, which are merged when adapters are combined"""


def entries_after_change(foreign: Any) -> dict[str, str]:
    """Header entries that are still true after the adapter's weights changed: those about pictures and settings."""
    entries = foreign.items() if isinstance(foreign, Mapping) else ()
    return {str(key): str(value) for key, value in entries if not _FILE_ENTRIES.fullmatch(str(key))}


def common_entries(entries: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Header entries of a combined adapter: those that are equal in all of `entries`, and all folders and tags."""
    first, *others = entries
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    for key in _FOLDER_ENTRIES:
        if merged := _merge_folders([entry[key] for entry in entries if key in entry]):
            common[key] = merged
    return common


def _merge_folders(texts: Sequence[str]) -> str:
    """Merge JSON objects by folder, the first value of a folder wins; returns "" if there are none."""
    merged: dict[str, Any] = {}
    for text in texts:
        try:
            folders = json.loads(text)
        except (ValueError, RecursionError):
            continue
        merged = {**folders, **merged} if isinstance(folders, dict) else merged
    return json.dumps(merged) if merged else ""


def training_settings(header: Mapping[str, str]) -> dict[str, str]:
    """The settings of a training run that a header holds, by short names."""
    settings = {name: header[key] for name, key in _SETTINGS.items() if header.get(key) not in (None, "", "None")}
    return settings | {key: value for key, value in header.items() if key.startswith("modelspec.") and value}


def tags(header: Mapping[str, str]) -> list[tuple[str, int]]:
    """Caption tags that a header lists, each with its number of occurrences, the most frequent first."""
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
    return "sd2" if header.get("ss_v2") == "True" else None  # older files of kohya's have only this entry


def _number(text: str | None) -> int | float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    if value != value or abs(value) == float("inf"):
        return None
    return int(value) if value.is_integer() else value


def recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    """Return the settings of a recipe in a header as lines of ``KEY=VALUE``, as a command line takes them.

    A header has only what differs from the defaults. The first line begins with the topic.
    """
    settings = [line for key, value in recipe.items() for line in _settings(key, value)]
    return [f"{'' if place else 'recipe':8} {line}" for place, line in enumerate(settings)]


def _settings(key: str, value: Any) -> list[str]:
    """Return a setting as ``KEY=VALUE``, one for each inner key."""
    if isinstance(value, list) and any(isinstance(own, Mapping) for own in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return [line for inner, own in value.items() for line in _settings(f"{key}.{inner}", own)]
    if isinstance(value, list):
        return [f"{key}={','.join(map(str, value))}"]
    shown = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
    return [f"{key}={shown}"]
