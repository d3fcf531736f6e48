"""Concept sliders: an adapter whose strength moves pictures along an axis between two prompts.

Gandikota et al. 2023, arXiv:2311.12092, equation 8, after LECO. Under the target prompt c, the adapter is to predict

    base(x_t, c) + η · (base(x_t, c₊) − base(x_t, c₋))

so that strength 1 moves towards the positive prompt c₊, and strength −1 towards the negative one c₋. With `both`, the
adapter at strength −1 is to predict the same with −η as well, as ai-toolkit trains sliders. Training needs no pictures
of the axis: x_t are noisy pictures of the target, which the base can draw itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


class SliderOptions(Strict):
    """Options of the objective `slider`: `loss.options.NAME=VALUE`."""

    positive: str = ""
    """Prompt that strength 1 moves towards"""
    negative: str = ""
    """Prompt that strength −1 moves towards; unset: the empty prompt"""
    guidance: float = Field(4.0, gt=0, le=100)
    """Scale η of the shift that is learned at strength 1"""
    both: bool = False
    """Whether strength −1 is trained too, instead of strength 1 alone; takes a second prediction for each sample"""
    preserve: list[str] = Field(default_factory=list)
    """Attributes that must not change with the axis, such as "male|female": each sample has one of them after its
    prompts, in turn; separated by `|`, or a list in a file"""

    @field_validator("preserve", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Split text from the command line at vertical bars."""
        return [part.strip() for part in value.split("|") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_axis(self) -> "SliderOptions":
        """Refuse two equal prompts, between which there is no axis."""
        if self.positive == self.negative:
            raise ValueError("positive and negative must be prompts that differ")
        return self

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths that are trained."""
        return (1.0, -1.0) if self.both else (1.0,)

    def with_attributes(self, prompt: str) -> list[str]:
        """Return a prompt with each of the attributes; without attributes, the prompt alone."""
        return [", ".join(part for part in (prompt, attribute) if part) for attribute in self.preserve] or [prompt]


class Slider:
    """E‖prediction(x_t, c; s) − base(x_t, c) − s · η · (base(x_t, c₊) − base(x_t, c₋))‖², averaged over strengths s."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        self.stream, self.bare = inputs.instances, inputs.bare
        self.options: SliderOptions = inputs.options
        self.at_strength = inputs.at_strength
        if self.options.both and self.at_strength is None:
            raise DiffgraftError("loss.options.both=true needs a method whose adapter can act with the strength −1.")

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` samples as "loss", and that of the base without the adapter as "base"."""
        batch = self.stream.batch(sample_index, count)
        noisy, times, frames = batch.noisy, batch.times, batch.frames
        target, positive, negative = (
            [*self._in_turn(prompts, sample_index)]
            for prompts in (batch.prompts, [self.options.positive] * count, [self.options.negative] * count)
        )
        with torch.no_grad():
            three = self.bare(noisy.repeat(3, 1, 1, 1), times.repeat(3), [*target, *positive, *negative], [*frames] * 3)
            own, towards, away = three.chunk(3)
            shift = self.options.guidance * (towards - away)

        def loss(prediction: Tensor, strength: float) -> Tensor:
            errors = self.stream.process.loss_per_sample(prediction, own + strength * shift, times, batch.mask)
            return (errors * batch.weight).mean()

        losses = []
        for strength in self.options.strengths:
            with nullcontext() if self.at_strength is None else self.at_strength(strength):
                losses.append(loss(predict(noisy, times, target, frames), strength))
        return {"loss": torch.stack(losses).mean(), "base": loss(own, 1.0)}

    def _in_turn(self, prompts: Sequence[str], sample_index: int) -> Iterator[str]:
        """Yield the prompts of consecutive samples, each with the next of the attributes."""
        for index, prompt in enumerate(prompts, sample_index):
            variants = self.options.with_attributes(prompt)
            yield variants[index % len(variants)]

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.stream.picture_names(sample_index, count)


def _prompts(options: SliderOptions, targets: Sequence[str]) -> list[str]:
    """Return every prompt that a slider with these options and targets asks for."""
    prompts = (*targets, options.positive, options.negative)
    return [text for prompt in prompts for text in options.with_attributes(prompt)]


OBJECTIVE = ObjectiveKind(
    "slider",
    "An axis between two prompts, along which the strength moves (concept sliders).",
    Slider,
    options=SliderOptions,
    prompts=_prompts,
    strengths=lambda options: options.strengths,
    bare_predictions=3,
    uses_prior=False,
    reads_captions=False,
    draws_pictures=True,
)
