"""The contract of a measure, and all measures by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.evaluation.evidence import Estimator, Evidence
from diffgraft.plugins import discover

Role = Literal["likeness", "following", "composition", "diversity", "drift", ""]
"""What a measure tells the verdict, in the order of tables; empty: it is only shown"""


@dataclass(frozen=True)
class Measure:
    """A measure of an adapter at a strength."""

    name: str
    title: str
    """Few words for tables"""
    summary: str
    """What it is and where it is from, in a sentence"""
    better: Literal["higher", "lower"]
    estimator: Callable[[Evidence], Estimator]
    """Maps evidence to the function that gives the measure's value from the pictures of some of the seeds"""
    encoder: str = ""
    """Task of the encoder that it needs: ``clip``, ``dino``, ``patches`` or ``pickscore``; empty: none"""
    role: Role = ""
    least_references: int = 0
    """Number of pictures of what was learned below which it has no value"""
    needs_losses: bool = False
    """Whether it is the loss on held-out pictures"""
    least_seeds: int = 1
    """Number of seeds below which it has no value"""
    is_default: bool = True
    """Whether it is computed unless measures are named"""


@cache
def measures() -> dict[str, Measure]:
    """All measures by name, in the order of tables: those of `measures/`, and those of outside packages.

    Raises:
        DiffgraftError: an entry point is not a `Measure`, or two measures have the same name.
    """
    found = discover(Measure, "diffgraft.evaluation.measures", "MEASURE", "diffgraft.measures")
    return dict(sorted(found.items(), key=lambda item: (get_args(Role).index(item[1].role), item[0])))


def get_measure(name: str) -> Measure:
    """Return the measure called `name`.

    Raises:
        DiffgraftError: there is none; the message names the nearest one.
    """
    if name not in measures():
        raise DiffgraftError(f"There is no measure {name!r}: {did_you_mean(name, measures())}")
    return measures()[name]


ENCODERS: Mapping[str, str] = {
    "clip": "openai/clip-vit-large-patch14",
    "dino": "facebook/dinov2-base",
    "patches": "google/siglip2-base-patch16-naflex",
    "pickscore": "yuvalkirstain/PickScore_v1",
}
"""Task of an encoder → hub id of the one that is usual for it"""
