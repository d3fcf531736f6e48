"""The contract of an objective: it defines the loss of a training step.

A new objective is one module of this package, or of an outside package that registers it in the entry-point group
``diffgraft.objectives``. The module has::

    OBJECTIVE = ObjectiveKind("mine", "one line on what it does", build=MyObjective)

where ``MyObjective(inputs: ObjectiveInputs)`` is an `Objective`. ``loss.objective=mine`` in a recipe selects it. If it
has settings, ``options=MyOptions`` names a pydantic model of them: ``loss.options.NAME=VALUE``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.strict import Strict, validated
from diffgraft.trainers.objectives.batch import Predict, SampleStream

GROUP = "diffgraft.objectives"
"""Entry-point group in which outside packages register their objectives"""


@dataclass(frozen=True)
class PairKind:
    """What the two pictures of a pair are called."""

    own: str
    """Kind of the pictures in the image folder, such as preferred"""
    other: str
    """Kind of their partners, such as rejected, and the name of the folder with them"""


@dataclass(frozen=True)
class ObjectiveInputs:
    """Inputs that an objective is built from."""

    instances: SampleStream
    """Training pictures"""
    classes: SampleStream | None
    """Class images, with λ as their weight; None without prior preservation by pictures"""
    prior_weight: float
    """Weight λ of prior preservation by prediction; 0 without it"""
    bare: Predict
    """The denoiser without the adapter"""
    partners: SampleStream | None = None
    """The other pictures of pairs: sample by sample those of `instances`, with the same crop, noise and timestep"""
    at_strength: Callable[[float], AbstractContextManager[None]] | None = None
    """Block within which the adapter acts with a strength; None if the method has no strength other than 1"""
    base: Base | None = None
    """The base with the adapter, for objectives that decode pictures; None where the VAE is not at hand"""
    options: Any = None
    """Options of the objective, an instance of its `ObjectiveKind.options`"""


class Objective(Protocol):
    """The loss of a step; the training loop calls `losses` once for each micro-batch of each process."""

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the loss of `count` samples as "loss", and further terms to record; all are scalars.

        Args:
            predict: the denoiser with the adapter; gradients flow through its prediction.
            sample_index: index of the first sample, counted through the whole run.
            count: number of samples.
        """

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of these samples, for messages."""


class NoOptions(Strict):
    """Options of an objective that has none."""


@dataclass(frozen=True)
class ObjectiveKind:
    """Registry entry of an objective."""

    name: str
    summary: str
    """Description in one line"""
    build: Callable[[ObjectiveInputs], Objective]
    """Builds the objective; raises DiffgraftError if the inputs lack what it needs"""
    options: type[BaseModel] = NoOptions
    """Class of its options"""
    prompts: Callable[[Any, Sequence[str]], Sequence[str]] = lambda options, prompts: ()  # noqa: ARG005
    """Function of its options and the prompts of the pictures: further prompts that it asks for, to be encoded before
    training"""
    check: Callable[[Any, Base], None] = lambda options, base: None  # noqa: ARG005
    """Function of its options and the base, which may be on the device ``meta``: raises DiffgraftError if the objective
    has no meaning for this base, or something that the options name is missing"""
    predictions: int = 1
    """Number of predictions with gradients that it takes for each sample, at each of its strengths"""
    strengths: Callable[[Any], Sequence[float]] = lambda options: (1.0,)  # noqa: ARG005
    """Function of its options: strengths of the adapter that it trains at"""
    bare_predictions: int = 0
    """Number of predictions without gradients that it takes for each sample"""
    has_own_error: bool = False
    """Whether it has an error of its own, so that `loss.kind`, `loss.snr_gamma` and `loss.debiased` have no effect"""
    uses_prior: bool = True
    """Whether prior preservation has an effect with it"""
    pairs: PairKind | None = None
    """Kinds of the pictures of the pairs that it trains on; None: it trains on single pictures"""
    reads_captions: bool = True
    """Whether what it learns depends on the captions of the pictures, so that `plan` advises to write missing ones"""
    needs_prompts: bool = False
    """Whether it has no meaning for a picture with an empty prompt, so that such pictures are refused"""
    draws_pictures: bool = False
    """Whether the base draws the pictures where the recipe has no `images`"""
    uses_vae: bool = False
    """Whether it decodes pictures, so that the VAE stays on the device"""
    own_bytes: Callable[[Any], int] = lambda options: 0  # noqa: ARG005
    """Function of its options: bytes of the networks that it loads beside the base"""
    own_hash: Callable[[Any], str] = lambda options: ""  # noqa: ARG005
    """Function of its options: hash over the contents of these networks, which a resumed run must have again"""

    def read_options(self, values: Mapping[str, Any]) -> BaseModel:
        """Validate the values of the recipe's `loss.options`.

        Raises:
            DiffgraftError: an option is unknown, or its value is invalid.
        """
        known = self.options.model_fields
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known) if known else "it has no options."
                raise DiffgraftError(f"The objective {self.name!r} has no option {key!r}: {hint}")
        return validated(self.options, values, "loss.options")
