"""What the steps of a run depend on: kept in its checkpoints, so that what differs later is told key by key."""

from collections.abc import Mapping
from typing import Any

from diffgraft.trainers.recipe.recipe import TASKS, Recipe

Fingerprint = Mapping[str, Any]
"""`recipe`, what counts of it; `base`, the base's hash; `data`, the digest of the pictures and what is said of them;
`start`, the hash of the adapter file that it begins with; `processes`, how many share a step; `changes`, what was
changed on purpose on the way, each with the step after which, where there was any"""
_TOLD = {
    "base": "the base differs",
    "data": "the pictures, or what is said of them, differ",
    "start": "the file of init_from differs",
}


def run_fingerprint(
    recipe: Recipe, base: str, data: str = "", start: str | None = "", processes: int = 1
) -> Fingerprint:
    """The fingerprint of a run; without `data` as long as the pictures have not been gathered."""
    more = {**({"data": data} if data else {}), **({} if start is None else {"start": start})}
    return {"recipe": recipe.fingerprint(), "base": base, "processes": processes, **more}


def differences(kept: Fingerprint, now: Fingerprint) -> list[str]:
    """What is not as it was, each in a few words; what one of them does not say is left out."""
    before, after = flat(kept["recipe"]), flat(now["recipe"])
    defaults = flat(TASKS[after["task"]].model_construct().model_dump(mode="json"))  # for keys that are new
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = (side.get(key, defaults.get(key)) for side in (before, after))
        if old != new:
            found.append(f"{key}: {_said(old)} → {_said(new)}")
    if kept["processes"] != now["processes"]:
        found.append(f"processes: {kept['processes']} → {now['processes']}")
    return found + [said for key, said in _TOLD.items() if key in kept and key in now and kept[key] != now[key]]


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
