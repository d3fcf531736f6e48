"""Objectives by name, and the one that a run trains by."""

from functools import cache

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.plugins import discover
from diffgraft.trainers.objectives.objective import GROUP, Objective, ObjectiveInputs, ObjectiveKind


@cache
def objectives() -> dict[str, ObjectiveKind]:
    """Every objective by name: one of each module of this package, and those of outside packages."""
    return discover(ObjectiveKind, "diffgraft.trainers.objectives", "OBJECTIVE", GROUP)


def check_objective(name: str) -> None:
    """Raise DiffgraftError where there is no objective `name`; the nearest is named. Empty stands for a default."""
    if name and name not in objectives():
        raise DiffgraftError(f"Unknown loss.objective={name!r}: {did_you_mean(name, objectives())}")


def new_objective(name: str, inputs: ObjectiveInputs) -> Objective:
    """The objective called `name`; with an empty name the one that the prior preservation of `inputs` asks for.

    Raises:
        DiffgraftError: there is none, or it cannot be made of `inputs`.
    """
    check_objective(name)
    default = "dreambooth" if inputs.classes else "prior-prediction" if inputs.prior_weight else "captioned"
    return objectives()[name or default].build(inputs)
