"""Which objective a recipe trains by; each is a file of its own."""

from typing import Any

from torch import Tensor

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.trainers.captioned import Captioned
from diffgraft.trainers.denoising import Denoiser, forward_process
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.gradients import Objective
from diffgraft.trainers.materials import Materials
from diffgraft.trainers.preserving import Preserving
from diffgraft.trainers.recipe import Recipe


def new_objective(plan: Recipe, base: Base, materials: Materials, denoiser: Denoiser, live: Attached) -> Objective:
    """That of a run: what it learns, and how the class is held."""
    process, ours = forward_process(base, plan.noise, plan.timesteps, plan.loss), materials.learnt
    if materials.prior is not None:
        return DreamBooth(ours, materials.prior, process, plan.seed, base.device)
    if materials.prior_weight:

        def bare(*asked: Any) -> Tensor:
            with live.bare():
                said: Tensor = denoiser(*asked)
            return said

        return Preserving(ours, bare, materials.prior_weight, process, plan.seed, base.device)
    return Captioned(ours, process, plan.seed, base.device)
