"""Sliders from pairs of pictures: an adapter whose strength moves pictures along an axis that words do not name.

Gandikota et al. 2023, arXiv:2311.12092, the section on visual concept sliders. At strength s the adapter learns the
positive picture x⁺ of each pair, and at strength −s the negative one x⁻, under the same prompt:

    ‖target⁺ − prediction(x⁺_t; s)‖² + ‖target⁻ − prediction(x⁻_t; −s)‖²

Both have the same noise and timestep, so that what they have in common pulls the adapter into opposite directions, and
only their difference is learned. The authors' script (``train_lora-scale.py``) has the same loss.
"""

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind, PairKind


class PictureSliderOptions(Strict):
    """Options of the objective `picture-slider`: `loss.options.NAME=VALUE`."""

    strength: float = Field(1.0, gt=0, le=100)
    """Strength s that positive pictures are learned at; negative ones are learned at −s"""


class PictureSlider:
    """The error of positive pictures at strength s, plus that of negative pictures at strength −s."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        if inputs.partners is None:
            raise DiffgraftError(
                "loss.objective=picture-slider needs pairs: put a negative picture for each positive one, of the same "
                "name, into the folder `negative` beside them."
            )
        if inputs.at_strength is None:
            raise DiffgraftError(
                "loss.objective=picture-slider needs a method whose adapter can act with the strengths 1 and −1."
            )
        self.positive, self.negative = inputs.instances, inputs.partners
        self.at_strength, self.strength = inputs.at_strength, inputs.options.strength

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` pairs as "loss", and its two terms as "positive" and "negative"."""
        batch = self.positive.batch(sample_index, count)
        other = replace(self.negative.batch(sample_index, count), mask=batch.mask)
        terms = {}
        for name, half, strength in (("positive", batch, self.strength), ("negative", other, -self.strength)):
            with self.at_strength(strength):
                prediction = predict(half.noisy, half.times, half.prompts, half.frames)
            terms[name] = half.loss(self.positive.process, prediction)
        return {"loss": terms["positive"] + terms["negative"], **terms}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the positive pictures of `count` pairs."""
        return self.positive.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind(
    "picture-slider",
    "An axis between pairs of pictures, along which the strength moves (visual concept sliders).",
    PictureSlider,
    options=PictureSliderOptions,
    strengths=lambda options: (options.strength, -options.strength),
    uses_prior=False,
    reads_captions=False,
    pairs=PairKind("positive", "negative"),
)
