"""Registry of objectives, and the default objective of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.plugins import discover
from diffgraft.trainers.objectives.objective import GROUP, Objective, ObjectiveInputs, ObjectiveKind


@cache
def objectives() -> dict[str, ObjectiveKind]:
    """Return all objectives by name: those of the modules of this package, and those of outside packages."""
    return discover(ObjectiveKind, "diffgraft.trainers.objectives", "OBJECTIVE", GROUP)


def check_objective(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Check the name and options of an objective; an empty name stands for the default, which has no options.

    Raises:
        DiffgraftError: there is no such objective (the message names the nearest one), or no such option.
    """
    if name and name not in objectives():
        raise DiffgraftError(f"Unknown loss.objective={name!r}: {did_you_mean(name, objectives())}")
    if options and not name:
        raise DiffgraftError("loss.options are those of an objective: set loss.objective as well.")
    if name:
        objectives()[name].read_options(options or {})


def check_objective_for(name: str, options: Mapping[str, Any], base: Base) -> None:
    """Check that an objective has a meaning for a base, which may be on the device ``meta``.

    Raises:
        DiffgraftError: it has none, or something that its options name is missing.
    """
    if name:
        objectives()[name].check(objectives()[name].read_options(options), base)


def objective_prompts(name: str, options: Mapping[str, Any], prompts: Sequence[str]) -> Sequence[str]:
    """Return the prompts that the objective called `name` asks for beside those of the pictures, `prompts`."""
    return objectives()[name].prompts(objectives()[name].read_options(options), prompts) if name else ()


def reads_captions(name: str) -> bool:
    """Whether what the objective called `name` learns depends on captions; an empty name stands for the default."""
    return not name or objectives()[name].reads_captions


def objective_hash(name: str, options: Mapping[str, Any]) -> str:
    """Return the hash of the networks that the objective called `name` loads beside the base; empty without any."""
    return objectives()[name].own_hash(objectives()[name].read_options(options)) if name else ""


def uses_vae(name: str) -> bool:
    """Whether the objective called `name` decodes pictures; an empty name stands for the default, which does not."""
    return bool(name) and objectives()[name].uses_vae


def default_objective(has_class_images: bool, is_by_prediction: bool) -> str:
    """Return the name of the objective that fits the prior preservation of a recipe."""
    return "dreambooth" if has_class_images else "prior-prediction" if is_by_prediction else "captioned"


def new_objective(name: str, inputs: ObjectiveInputs, options: Mapping[str, Any] | None = None) -> Objective:
    """Build the objective called `name`; if empty, the one that fits the prior preservation of `inputs`.

    Raises:
        DiffgraftError: there is no such objective or option, or `inputs` lack what it needs.
    """
    check_objective(name, options)
    kind = objectives()[name or default_objective(bool(inputs.classes), bool(inputs.prior_weight))]
    return kind.build(replace(inputs, options=kind.read_options(options or {})))
