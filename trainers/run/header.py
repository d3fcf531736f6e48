"""Metadata in an adapter file's header: how the adapter was trained."""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffgraft.bases import Base
from diffgraft.bases.prediction import PREDICTION_KEY
from diffgraft.trainers.recipe.files import unsupported_keys
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import Fingerprint


def adapter_header(recipe: Recipe, base: Base, fingerprint: Fingerprint) -> dict[str, Any]:
    """Metadata of a trained adapter.

    It depends on recipe, base, images and accepted changes alone, so that equal runs write equal files.
    """
    has_rank = "rank" not in unsupported_keys(recipe)
    concepts = [{"trigger": concept.trigger, "class": getattr(concept, "subject", None)} for concept in recipe.parts()]
    # a start from the weight is part of the file's factors
    doubled = 2 if recipe.options.get("init", "zero") != "zero" else 1
    size: dict[str, float] = {"rank": doubled * recipe.rank}
    if "alpha" not in unsupported_keys(recipe):
        size["alpha"] = doubled * recipe.alpha_or_rank()
    return {
        "method": recipe.method,
        **(size if has_rank else {}),
        **({"options": recipe.options} if recipe.options else {}),
        "trigger": recipe.trigger,
        "class": getattr(recipe, "subject", None),
        **({"concepts": concepts} if recipe.concepts else {}),
        "base": {
            "name": Path(recipe.base).name,
            "family": base.family.name,
            "hash": fingerprint["base"],
            PREDICTION_KEY: base.parameterization.name,
            **base.family.header(base),
        },
        "recipe": recipe.header(),
        **({"under": fingerprint["under"]} if recipe.under.adapter else {}),
        "seed": recipe.seed,
        "data": fingerprint["data"],
        **({"changes": fingerprint["changes"]} if "changes" in fingerprint else {}),
        "versions": dict(_versions()),
    }


@cache
def _versions() -> dict[str, str]:
    """Return package → its version, which is read from a file of each."""
    return {name: version(name) for name in ("diffgraft", "torch", "diffusers", "transformers", "peft")}
