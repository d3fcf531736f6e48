"""Checks of a run before anything is generated, trained or written, shared by `train` and `plan`."""

from collections.abc import Sequence

import torch

from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.data.inventory import list_names
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.registry import check_objective, check_objective_for, objectives
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
from diffgraft.trainers.run.under import check_under
from diffgraft.trainers.runtime.block_swap import check_swap_settings
from diffgraft.trainers.runtime.shards import check_compatible
from diffgraft.trainers.runtime.speed import check_speed
from diffgraft.trainers.training_data.build import prior_prediction_weight, resolution_of, user_class_images
from diffgraft.trainers.training_data.concepts import ConceptImages
from diffgraft.trainers.training_data.prompts import prompt_builders


def check_settings(
    model: ModelSettings,
    adapter: AdapterSettings,
    optim: OptimSettings,
    objective: ObjectiveSettings,
    runtime: RuntimeSettings,
    outputs: OutputSettings,
    device: torch.device,
) -> None:
    """Check all settings that need neither images nor base, against each other and against this machine.

    Raises:
        DiffgraftError: settings contradict each other, or are not supported here.
    """
    get_method(adapter.method).read_options(adapter.options)
    check_format(outputs.format, adapter)
    check_objective(objective.loss.objective, objective.loss.options)
    check_optimizer(optim, [])
    check_compatible(runtime, model.quantize)
    check_swap_settings(runtime)
    check_speed(runtime, device)
    check_under(adapter, runtime, outputs)


def check_pictures(read: ConceptImages) -> None:
    """Check the prior preservation of all concepts: their class images exist, and their kinds can be combined.

    Raises:
        DiffgraftError: a folder of class images is missing or empty, or concepts mix kinds of prior preservation.
    """
    prior_prediction_weight(read)
    folders = {
        prior.folder: concept
        for concept, _ in read
        if (prior := concept.prior_preservation) is not None and prior.folder
    }
    for concept in folders.values():
        prior = concept.prior_preservation
        if prior is not None and prior.by == "pictures":
            for _ in user_class_images(concept, prior):
                pass


def check_prompts(objective: ObjectiveSettings, read: ConceptImages) -> None:
    """Check that every picture has a prompt, if the objective has no meaning without one.

    Raises:
        DiffgraftError: the prompt of a picture is empty, or prompts are dropped.
    """
    name = objective.loss.objective
    if not name or not objectives()[name].needs_prompts:
        return
    for concept, pictures in read:
        if concept.caption_dropout:
            raise DiffgraftError(
                f"loss.objective={name} compares pictures with their prompts, of which caption_dropout="
                f"{concept.caption_dropout:g} empties a share: set caption_dropout=0."
            )
        # without pictures, the base draws them of the prompt
        texts = {own.name: prompt_builders(concept, own)[0].prompts() for own in pictures}
        texts = texts or {"the pictures that are drawn": [concept.fill(concept.prompt)]}
        if empty := [picture for picture, prompts in texts.items() if not all(text.strip() for text in prompts)]:
            raise DiffgraftError(
                f"loss.objective={name} compares pictures with their prompts, but the prompt of {list_names(empty)} is "
                "empty: add captions, or set prompt."
            )


def check_family(groups: Sequence[Group], base: Base) -> None:
    """Check that the recipe's `groups` set nothing that the base's family does not support.

    Raises:
        DiffgraftError: they set an unsupported key; the message has the family's reason.
    """
    for key, reason in base.family.unsupported.items():
        name, _, inner = key.partition(".")
        for group in groups:
            value, default = (getattr(settings, name, None) for settings in (group, type(group).model_construct()))
            value, default = (getattr(setting, inner, None) if inner else setting for setting in (value, default))
            if value != default:
                raise DiffgraftError(
                    f"{key}={value} has no meaning for bases of the family {base.family.name}: {reason}. Remove it."
                )


def check_base(data: DataSettings, objective: ObjectiveSettings, base: Base) -> None:
    """Check that the base can be trained at the recipe's resolution and timesteps, and with its objective.

    Raises:
        DiffgraftError: the resolution is not a multiple of the base's step, the timesteps are not in its schedule, or
            the objective has no meaning for the base.
    """
    side, step = resolution_of(data, base), base.size_step
    if side % step:
        nearest = max(step, round(side / step) * step)
        raise DiffgraftError(f"Invalid value resolution={side}: this base needs a multiple of {step}. Use {nearest}.")
    forward_process(base, objective)
    check_objective_for(objective.loss.objective, objective.loss.options, base)
