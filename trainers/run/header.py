"""What an adapter file says of how it was made."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffgraft.bases import Base
from diffgraft.trainers.recipe.files import unsupported_keys
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import Fingerprint

_USUAL_LAYERS = 2
"""Layers in a block of all UNets of Stable Diffusion; files say it of others, as some names are counted by it"""


def header(plan: Recipe, base: Base, fingerprint: Fingerprint) -> dict[str, Any]:
    """All of it is a function of recipe, base, pictures and what was changed on the way: equal runs, equal files."""
    names = ("diffgraft", "torch", "diffusers", "transformers", "peft")
    layers = base.unet.config.layers_per_block
    has_rank = "rank" not in unsupported_keys(plan)
    return {
        "method": plan.method,
        **({"rank": plan.rank, "alpha": plan.scale_alpha()} if has_rank else {}),
        **({"options": plan.options} if plan.options else {}),
        "trigger": plan.trigger,
        "class": getattr(plan, "subject", None),
        **({"concepts": _concepts(plan)} if plan.concepts else {}),
        "base": {
            "name": Path(plan.base).name,
            "family": base.family.name,
            "hash": base.hash,
            "prediction_type": base.prediction_type,
            **({"layers_per_block": layers} if isinstance(layers, int) and layers != _USUAL_LAYERS else {}),
        },
        "recipe": plan.header(),
        "seed": plan.seed,
        "data": fingerprint["data"],
        **({"changes": fingerprint["changes"]} if "changes" in fingerprint else {}),
        "versions": {name: version(name) for name in names},
    }


def _concepts(plan: Recipe) -> list[dict[str, Any]]:
    return [{"trigger": one.trigger, "class": getattr(one, "subject", None)} for one in plan.parts()]
