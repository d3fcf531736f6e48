"""What the steps of a run depend on: kept in its checkpoints, so that what differs later is told key by key."""

from collections.abc import Mapping
from typing import Any

from diffgraft.trainers.recipe.recipe import TASKS, Recipe
from diffgraft.trainers.recipe.renamed import with_current_keys

Fingerprint = Mapping[str, Any]
"""`recipe`, what counts of it; `base`, the base's hash; `data`, the digest of the pictures and what is said of them;
`start`, the hash of the adapter file that it begins with; `processes`, how many share a step; `changes`, what was
changed on purpose on the way, each with the step after which, where there was any; `paths`, where base, pictures and
file lay, which only messages tell"""
_TOLD = {
    "base": ("base", "the base differs"),
    "data": ("images", "the pictures or their captions differ"),
    "start": ("init_from", "the file of init_from differs"),
}
"""Part of an identity → its key in a recipe, and what is said where it differs"""


def run_fingerprint(
    recipe: Recipe, base: str, data: str = "", start: str | None = "", processes: int = 1
) -> Fingerprint:
    """The fingerprint of a run; without `data` as long as the pictures have not been gathered."""
    more = {**({"data": data} if data else {}), **({} if start is None else {"start": start})}
    paths = {
        "base": recipe.base,
        "images": ", ".join(part.images for part in recipe.parts()),
        "init_from": recipe.init_from,
    }
    return {"recipe": recipe.fingerprint(), "base": base, "processes": processes, **more, "paths": paths}


def differences(kept: Fingerprint, now: Fingerprint) -> list[str]:
    """What is not as it was, each in a few words; what one of them does not say is left out."""
    # checkpoints of the release before have former names of keys, among them those whose order counts
    earlier = with_current_keys(kept["recipe"], warn=False)
    earlier["order"] = with_current_keys(earlier.get("order", {}), warn=False)
    before, after = flat(earlier), flat(now["recipe"])
    defaults = flat(TASKS[after["task"]].model_construct().model_dump(mode="json"))  # for keys that are new
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = (side.get(key, defaults.get(key)) for side in (before, after))
        if old != new:
            found.append(f"{key}: {_said(old)} → {_said(new)}")
    if kept["processes"] != now["processes"]:
        found.append(f"processes: {kept['processes']} → {now['processes']}")
    for part, (key, said) in _TOLD.items():
        if part in kept and part in now and kept[part] != now[part]:
            # checkpoints of earlier releases do not tell where it lay
            old, new = (side.get("paths", {}).get(key) for side in (kept, now))
            found.append(f"{said} ({key}: {_said(old)} → {_said(new)})" if old is not None and old != new else said)
    return found


def after(kept: Fingerprint, step: int, now: Fingerprint) -> Fingerprint:
    """The fingerprint `now` of a run that had another one up to `step`: it has that change, and earlier ones."""
    new = [{"after": step, "what": what}] if (what := differences(kept, now)) else []
    changes = [*kept.get("changes", []), *new]
    return {**now, "changes": changes} if changes else now


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested values by their paths: {"prior.weight": 1.0, "concepts.0.repeats": 2}."""
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = {str(place): one for place, one in enumerate(value)}
    if not isinstance(value, Mapping):
        return {path: value}
    return {name: one for key, inner in value.items() for name, one in flat(inner, f"{path}.{key}".strip(".")).items()}


def _said(value: Any) -> str:
    return "unset" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
