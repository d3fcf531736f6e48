"""Knowledge distillation: a student predicts what the base predicts (Hinton et al. 2015, arXiv:1503.02531)."""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


class DistillationOptions(Strict):
    """Options of the objective `distillation`: `loss.options.NAME=VALUE`."""

    data: float = Field(0.0, ge=0, le=100)
    """Weight of the loss on the pictures themselves, beside that to the base's predictions"""


@dataclass(frozen=True)
class Distillation:
    """E‖ε_student(x_t, t, prompt) − ε_base(x_t, t, prompt)‖² + data · L_pictures.

    One sample in ten has an empty prompt, so that the student can be drawn with under guidance.
    """

    inputs: ObjectiveInputs

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the sum as "loss", and its terms as "distillation" and, without its weight, "instance"."""
        stream, data = self.inputs.instances, self.inputs.options.data
        batch = stream.batch(sample_index, count)
        numbers = range(sample_index, sample_index + count)
        prompts = ["" if number % 10 == 9 else prompt for number, prompt in zip(numbers, batch.prompts, strict=True)]
        with torch.no_grad():
            wanted = self.inputs.bare(batch.noisy, batch.times, prompts, batch.frames)
        found = predict(batch.noisy, batch.times, prompts, batch.frames)
        error = stream.process.loss_per_sample(found, wanted, batch.times, batch.mask)
        terms = {"distillation": (error * batch.weight).mean()}
        if data:
            terms["instance"] = batch.loss(stream.process, found)
        return {"loss": terms["distillation"] + data * terms.get("instance", 0.0), **terms}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.inputs.instances.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind(
    "distillation",
    "A student that predicts what the base predicts.",
    Distillation,
    options=DistillationOptions,
    prompts=lambda *_: ("",),
    bare_predictions=1,
    uses_prior=False,
    draws_pictures=True,
)
