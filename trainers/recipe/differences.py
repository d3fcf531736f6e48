"""Differences of what two adapters' headers tell of their training: recipe, base, pictures, versions."""

from collections.abc import Mapping
from typing import Any

from diffgraft.trainers.recipe.recipe import TASKS
from diffgraft.trainers.recipe.renamed import with_current_keys
from diffgraft.trainers.run.fingerprint import flatten


def metadata_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries in which the metadata of two adapters differ: dotted key → its values, None for a missing one.

    A header has only the settings of a recipe that differ from the defaults; here they are compared with these. If only
    one adapter has a recipe, it is left out, as all of its settings would be listed.
    """
    known = all(isinstance(metadata.get("recipe"), Mapping) for metadata in (first, second))
    before, after = (_entries(metadata, with_recipe=known) for metadata in (first, second))
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *(key for key in after if key not in before)]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _entries(metadata: Mapping[str, Any], *, with_recipe: bool) -> dict[str, Any]:
    """Return all entries by dotted keys, those of the recipe with its defaults and under their current names."""
    others = {key: value for key, value in metadata.items() if key != "recipe"}
    if not with_recipe:
        return flatten(others)
    recipe = metadata["recipe"]
    task = TASKS.get(str(recipe.get("task")))
    defaults = flatten(task.model_construct().model_dump(mode="json")) if task else {}
    settings = {**defaults, **flatten(with_current_keys(recipe, warn=False))}
    return {**flatten(others), **{f"recipe.{key}": value for key, value in settings.items()}}
