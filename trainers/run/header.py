"""What an adapter file says of how it was made."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffgraft.bases import Base
from diffgraft.bases.prediction import PREDICTION_KEY
from diffgraft.trainers.recipe.files import unsupported_keys
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import Fingerprint


def header(plan: Recipe, base: Base, fingerprint: Fingerprint) -> dict[str, Any]:
    """All of it is a function of recipe, base, pictures and what was changed on the way: equal runs, equal files."""
    names = ("diffgraft", "torch", "diffusers", "transformers", "peft")
    has_rank = "rank" not in unsupported_keys(plan)
    concepts = [{"trigger": one.trigger, "class": getattr(one, "subject", None)} for one in plan.parts()]
    return {
        "method": plan.method,
        **({"rank": plan.rank, "alpha": plan.scale_alpha()} if has_rank else {}),
        **({"options": plan.options} if plan.options else {}),
        "trigger": plan.trigger,
        "class": getattr(plan, "subject", None),
        **({"concepts": concepts} if plan.concepts else {}),
        "base": {
            "name": Path(plan.base).name,
            "family": base.family.name,
            "hash": base.hash,
            PREDICTION_KEY: base.parameterization.name,
            **base.family.header(base),
        },
        "recipe": plan.header(),
        "seed": plan.seed,
        "data": fingerprint["data"],
        **({"changes": fingerprint["changes"]} if "changes" in fingerprint else {}),
        "versions": {name: version(name) for name in names},
    }
