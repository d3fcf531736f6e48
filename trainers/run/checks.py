"""What a run is checked for before anything is drawn, trained or written: one list, for `train` and for `plan`."""

import torch

from diffgraft.adapters.method import Attached
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.registry import check_objective
from diffgraft.trainers.optim.lr_scales import lr_scales
from diffgraft.trainers.optim.optimizers import check_optimizer
from diffgraft.trainers.recipe.groups import DataSettings, ObjectiveSettings, OptimSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import check_format
from diffgraft.trainers.runtime.shards import check_compatible
from diffgraft.trainers.runtime.speed import check_speed
from diffgraft.trainers.training_data.build import own_class, resolution_of, step_of, weight_by_prediction
from diffgraft.trainers.training_data.concepts import ConceptImages


def check_settings(recipe: Recipe, device: torch.device) -> None:
    """Refuse settings that do not go together, or not with this machine; pictures and base are not needed.

    Raises:
        DiffgraftError: there are such settings.
    """
    get_method(recipe.method).read_options(recipe.options)
    check_format(recipe.format, recipe.adapter)
    check_objective(recipe.loss.objective)
    check_optimizer(recipe.optim, [])
    check_compatible(recipe.runtime, recipe.quantize)
    check_speed(recipe.runtime, device)


def check_pictures(read: ConceptImages) -> None:
    """Refuse class images that are not there, and classes that are preserved in ways that do not go together.

    Raises:
        DiffgraftError: there are such.
    """
    weight_by_prediction(read)
    folders = {
        prior.folder: part for part, _ in read if (prior := part.prior_preservation) is not None and prior.folder
    }
    for part in folders.values():
        prior = part.prior_preservation
        if prior is not None and prior.by == "pictures":
            for _ in own_class(part, prior):
                pass


def check_base(data: DataSettings, objective: ObjectiveSettings, base: Base) -> None:
    """Refuse what this base cannot be trained at: its sides, its timesteps.

    Raises:
        DiffgraftError: the recipe wants others.
    """
    side, step = resolution_of(data, base), step_of(base)
    if side % step:
        better = max(step, round(side / step) * step)
        raise DiffgraftError(f"resolution={side} is no multiple of {step}, which this base needs. Take {better}.")
    forward_process(base, objective)


def check_attached(optim: OptimSettings, live: Attached) -> None:
    """Refuse what the optimiser cannot do with what is attached.

    Raises:
        DiffgraftError: parameters have rates that it cannot keep apart.
    """
    trained = {name for name, value in live.trainable().items() if value.requires_grad}
    rates = lr_scales(optim.rates, live)
    check_optimizer(optim, [rates.get(name, 1.0) for name in trained])
