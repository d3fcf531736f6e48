"""Which objective a recipe trains by; each is a file of its own."""

from typing import Any

from torch import Tensor

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.trainers.captioned import Captioned
from diffgraft.trainers.denoising import Denoiser, Noising
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.gradients import Objective
from diffgraft.trainers.materials import Materials
from diffgraft.trainers.preserving import Preserving
from diffgraft.trainers.recipe import Recipe


def new_objective(plan: Recipe, base: Base, materials: Materials, denoiser: Denoiser, live: Attached) -> Objective:
    """That of a run: what it learns, and how the class is held."""
    noising, ours = noising_of(plan, base), materials.learnt
    if materials.prior is not None:
        return DreamBooth(ours, materials.prior, noising, plan.seed, base.device)
    if materials.prior_weight:

        def bare(*asked: Any) -> Tensor:
            with live.bare():
                said: Tensor = denoiser(*asked)
            return said

        return Preserving(ours, bare, materials.prior_weight, noising, plan.seed, base.device)
    return Captioned(ours, noising, plan.seed, base.device)


def noising_of(plan: Recipe, base: Base) -> Noising:
    """How noise is drawn for it, and errors are counted.

    Raises:
        DiffgraftError: its timesteps are none of the base's.
    """
    return Noising(base, plan.noise, plan.timesteps, plan.loss, plan.masks)
