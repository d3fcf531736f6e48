"""Registry of objectives, and the default objective of a run."""

from functools import cache

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.plugins import discover
from diffgraft.trainers.objectives.objective import GROUP, Objective, ObjectiveInputs, ObjectiveKind


@cache
def objectives() -> dict[str, ObjectiveKind]:
    """Return all objectives by name: those of the modules of this package, and those of outside packages."""
    return discover(ObjectiveKind, "diffgraft.trainers.objectives", "OBJECTIVE", GROUP)


def check_objective(name: str) -> None:
    """Raise DiffgraftError if there is no objective `name`, naming the nearest one; empty stands for the default."""
    if name and name not in objectives():
        raise DiffgraftError(f"Unknown loss.objective={name!r}: {did_you_mean(name, objectives())}")


def new_objective(name: str, inputs: ObjectiveInputs) -> Objective:
    """Build the objective called `name`; if empty, the one that fits the prior preservation of `inputs`.

    Raises:
        DiffgraftError: there is no such objective, or `inputs` lack what it needs.
    """
    check_objective(name)
    default = "dreambooth" if inputs.classes else "prior-prediction" if inputs.prior_weight else "captioned"
    return objectives()[name or default].build(inputs)
