"""The contract of an objective: what the loss of a step is.

A new objective is one module of this package, or of an outside package that names it in the entry-point group
``diffgraft.objectives``. It holds::

    OBJECTIVE = ObjectiveKind("mine", "one line on what it does", build=MyObjective)

where ``MyObjective(inputs: ObjectiveInputs)`` is an `Objective`. ``loss.objective=mine`` in a recipe trains by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffgraft.trainers.objectives.batch import Predict, SampleStream

GROUP = "diffgraft.objectives"
"""Entry-point group in which outside packages name their objectives"""


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective is made from."""

    instances: SampleStream
    """The pictures to learn from"""
    classes: SampleStream | None
    """Pictures of the class, where prior preservation is by pictures; each has its λ for a weight"""
    prior_weight: float
    """λ of prior preservation by prediction; 0 without it"""
    bare: Predict
    """The denoiser without the adapter"""


class Objective(Protocol):
    """The loss of a step; the training loop calls `losses` once for each micro-batch of each process."""

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """The loss of the `count` samples from `place` on, under "loss"; further terms are recorded beside it.

        All are scalars. `predict` is the denoiser with the adapter; gradients flow through what it returns.
        """

    def names(self, place: int, count: int) -> list[str]:
        """Names of the pictures of these samples, for messages."""


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective, as recipes name it."""

    name: str
    summary: str
    """One line on what it does"""
    build: Callable[[ObjectiveInputs], Objective]
    """Raises DiffgraftError where it cannot be made of what a run has"""
