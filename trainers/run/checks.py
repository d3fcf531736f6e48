"""What a run is checked for before anything is drawn, trained or written: one list, for `train` and for `plan`."""

from collections.abc import Sequence

import torch

from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.registry import check_objective
from diffgraft.trainers.optim.optimizers import check_optimizer
from diffgraft.trainers.recipe.groups import (
    AdapterSettings,
    DataSettings,
    Group,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    OutputSettings,
    RuntimeSettings,
)
from diffgraft.trainers.run.attach import check_format
from diffgraft.trainers.runtime.shards import check_compatible
from diffgraft.trainers.runtime.speed import check_speed
from diffgraft.trainers.training_data.build import own_class, resolution_of, step_of, weight_by_prediction
from diffgraft.trainers.training_data.concepts import ConceptImages


def check_settings(
    model: ModelSettings,
    adapter: AdapterSettings,
    optim: OptimSettings,
    objective: ObjectiveSettings,
    runtime: RuntimeSettings,
    outputs: OutputSettings,
    device: torch.device,
) -> None:
    """Refuse settings that do not go together, or not with this machine; pictures and base are not needed.

    Raises:
        DiffgraftError: there are such settings.
    """
    get_method(adapter.method).read_options(adapter.options)
    check_format(outputs.format, adapter)
    check_objective(objective.loss.objective)
    check_optimizer(optim, [])
    check_compatible(runtime, model.quantize)
    check_speed(runtime, device)


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


def check_family(groups: Sequence[Group], base: Base) -> None:
    """Refuse settings that have no meaning for the family of a base.

    Raises:
        DiffgraftError: one of them is set in one of the `groups` of a recipe; the family says why it has no meaning.
    """
    for key, reason in base.family.unsupported.items():
        name, _, inner = key.partition(".")
        for group in groups:
            value, usual = (getattr(own, name, None) for own in (group, type(group).model_construct()))
            value, usual = (getattr(own, inner, None) if inner else own for own in (value, usual))
            if value != usual:
                raise DiffgraftError(
                    f"{key}={value} has no meaning for bases of the family {base.family.name}: {reason}. Leave it out."
                )


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
