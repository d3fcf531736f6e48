"""Evidence: what a measure sees of an adapter at a strength, and figures with their standard errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from diffgraft.evaluation.encoders import Encoders

Estimator = Callable[[Sequence[int]], float]
"""Value of a measure from the pictures of some of the seeds, given by their indices"""
Rows = Sequence[Sequence[Image.Image]]
"""Pictures by prompt, then by seed"""


@dataclass(frozen=True)
class Prompts:
    """Prompts that an adapter is evaluated with."""

    trained: tuple[str, ...]
    """Prompts of what the adapter has learned, with its trigger"""
    plain: tuple[str, ...]
    """The same prompts without the trigger: what the base alone draws, and what pictures are to follow"""
    of_class: tuple[str, ...]
    """Prompts without the trigger, whose pictures the adapter should not change"""


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture of what the adapter has learned."""

    image: Image.Image
    mask: Image.Image | None = None
    """White where the subject is, in the picture's size (mode L); None: everywhere"""


@dataclass(frozen=True, eq=False)
class Drawings:
    """Pictures of an adapter at a strength, or of the base alone, with the same seeds."""

    trained: Rows
    """Of `Prompts.trained`; of the base alone, of `Prompts.plain`"""
    of_class: Rows
    """Of `Prompts.of_class`"""

    @property
    def seeds(self) -> int:
        """Number of seeds that each prompt was drawn with."""
        return len(self.trained[0])


@dataclass(frozen=True, eq=False)
class Evidence:
    """What measures see: pictures, what they are compared with, and encoders."""

    drawn: Drawings
    bare: Drawings
    """Pictures of the base alone"""
    prompts: Prompts
    references: Sequence[Reference]
    encoders: Encoders
    losses: Tensor | None = None
    """Held-out loss at as many independent sets of noise as there are seeds, [seeds]; None without held-out pictures"""

    def of_bare(self, losses: Tensor | None = None) -> "Evidence":
        """Return the evidence of the base alone, which is the zero line of all figures."""
        return Evidence(self.bare, self.bare, self.prompts, self.references, self.encoders, losses)


@dataclass(frozen=True)
class Figure:
    """A value with its spread, and its difference from the zero line."""

    value: float
    error: float
    """Standard error over seeds; NaN with a single seed"""
    gain: float
    """Difference from the value of the base alone, at the same seeds"""
    gain_error: float
    """Standard error of the difference, whose pictures are paired by seed"""


def figure(own: Estimator, bare: Estimator, seeds: int) -> Figure:
    """Return the figure of an adapter, with the base alone as zero line."""
    value, error = jackknife(own, seeds)
    gain, gain_error = jackknife(lambda kept: own(kept) - bare(kept), seeds)
    return Figure(value, error, gain, gain_error)


def jackknife(estimate: Estimator, seeds: int) -> tuple[float, float]:
    """Return an estimate from all seeds, and its standard error by leaving out one seed at a time.

    SE² = (n − 1) / n · Σ (θ₋ᵢ − mean θ₋)² (Efron and Stein 1981); for a mean this is the usual standard error. With one
    seed it is NaN.
    """
    places = list(range(seeds))
    value = estimate(places)
    if seeds < 2:
        return value, math.nan
    without = [estimate([*places[:place], *places[place + 1 :]]) for place in places]
    mean = math.fsum(without) / seeds
    spread = math.fsum((each - mean) ** 2 for each in without)
    return value, math.sqrt((seeds - 1) / seeds * spread)


def mean_over(scores: Tensor) -> Estimator:
    """Return the estimator that is the mean of scores [prompts, seeds]."""
    return lambda kept: float(scores[:, list(kept)].double().mean())


def flat(rows: Rows) -> list[Image.Image]:
    """Return all pictures, seed after seed of each prompt."""
    return [image for row in rows for image in row]
