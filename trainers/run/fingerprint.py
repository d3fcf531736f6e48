"""Fingerprint of a run: everything that its steps depend on, stored in checkpoints and compared when resuming."""

from collections.abc import Mapping
from typing import Any

from diffgraft.trainers.recipe.recipe import TASKS, Recipe
from diffgraft.trainers.recipe.renamed import plain_value, with_current_keys

Fingerprint = Mapping[str, Any]
"""Mapping with these keys:

- `recipe`: the settings that affect steps
- `base`: the base's hash
- `data`: digest of the images and their captions
- `start`: hash of the adapter file of `init_from`
- `under`: hash of the adapter file of `under.adapter`
- `objective`: hash of the networks that the objective loads beside the base
- `processes`: number of processes that share a step
- `changes`: changes accepted when resuming, each with the step after which it was made; missing if there are none
- `paths`: paths of base, images and adapter file; not compared, but shown in messages
"""
_HASHED = {
    "base": ("base", "the base differs"),
    "data": ("images", "the pictures or their captions differ"),
    "start": ("init_from", "the file of init_from differs"),
    "under": ("under.adapter", "the file of under.adapter differs"),
    "objective": ("loss.objective", "the network that loss.objective judges by differs"),
}
"""Hashed entry of a fingerprint → its key in a recipe, and the message if it differs"""


def run_fingerprint(
    recipe: Recipe, base: str, data: str = "", files: Mapping[str, str | None] | None = None, processes: int = 1
) -> Fingerprint:
    """Fingerprint of a run.

    Args:
        recipe: the recipe.
        base: the base's hash.
        data: digest of the training data; empty before it is known, and then left out.
        files: `start`, `under` and `objective` → hash of the file or network; empty without one, None if unknown, and
            then left out.
        processes: number of processes that share a step.
    """
    hashes = {"data": data or None, "start": "", "under": "", "objective": "", **(files or {})}
    known = {name: value for name, value in hashes.items() if value is not None}
    paths = {
        "base": recipe.base,
        "images": ", ".join(concept.images for concept in recipe.parts()),
        "init_from": recipe.init_from,
        "under.adapter": recipe.under.adapter,
    }
    return {"recipe": recipe.fingerprint(), "base": base, "processes": processes, **known, "paths": paths}


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Short descriptions of what differs, such as ``lr: 0.001 → 0.01``; keys that only one has are not compared."""
    # checkpoints of the previous release have former names of keys, also in `order`
    saved = with_current_keys(old["recipe"], warn=False)
    saved["order"] = with_current_keys(saved.get("order", {}), warn=False)
    before, after = flatten(saved), flatten(new["recipe"])
    defaults = flatten(TASKS[after["task"]].model_construct().model_dump(mode="json"))  # for keys that are new
    diff = []
    for key in [*after, *(key for key in before if key not in after)]:
        was, now = (settings.get(key, defaults.get(key)) for settings in (before, after))
        # options are kept as they were given, which on a command line is text
        if was != now and not (key.startswith("options.") and plain_value(was) == plain_value(now)):
            name = f"order of {key.removeprefix('order.')}" if key.startswith("order.") else key
            diff.append(f"{name}: {_format(was)} → {_format(now)}")
    if old["processes"] != new["processes"]:
        diff.append(f"processes: {old['processes']} → {new['processes']}")
    for entry, (key, message) in _HASHED.items():
        if entry in old and entry in new and old[entry] != new[entry]:
            # checkpoints of earlier releases have no paths
            was, now = (fingerprint.get("paths", {}).get(key) for fingerprint in (old, new))
            has_moved = was is not None and was != now
            diff.append(f"{message} ({key}: {_format(was)} → {_format(now)})" if has_moved else message)
    return diff


def unexpected(expected: Mapping[str, str], fingerprint: Fingerprint) -> list[str]:
    """Messages on hashes of a run that is repeated, such as ``data`` and ``base``, that are not the `expected` ones."""
    return [
        f"The run that is repeated had other inputs: {_HASHED[entry][1]}. The result will differ."
        for entry, value in expected.items()
        if fingerprint.get(entry, value) != value
    ]


def record_changes(old: Fingerprint, step: int, new: Fingerprint) -> Fingerprint:
    """Return the fingerprint `new` with the changes recorded in `old` and those made to `old` after `step`."""
    latest = [{"after": step, "what": what}] if (what := differences(old, new)) else []
    changes = [*old.get("changes", []), *latest]
    return {**new, "changes": changes} if changes else new


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaf values of nested settings by their dotted paths: {"prior.weight": 1.0, "concepts.0.repeats": 2}."""
    if isinstance(value, list) and any(isinstance(element, dict) for element in value):
        value = {str(index): element for index, element in enumerate(value)}
    if not isinstance(value, Mapping):
        return {path: value}
    leaves = (flatten(inner, f"{path}.{key}".strip(".")) for key, inner in value.items())
    return {name: leaf for group in leaves for name, leaf in group.items()}


def _format(value: Any) -> str:
    return "unset" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
