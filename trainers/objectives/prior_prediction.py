"""Prior preservation by prediction: under the class prompt, the adapted base must predict what the base alone does.

This replaces the class images of DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, equation 2) by the prediction of the
frozen base for the instance pictures, with the same noise and timestep: the distillation of learning without forgetting
(Li and Hoiem 2016, arXiv:1606.09282).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


@dataclass(frozen=True)
class PriorPrediction:
    """L_instance + λ · E‖ε_θ(x_t, t, class) − ε_base(x_t, t, class)‖², over the same pictures."""

    inputs: ObjectiveInputs

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the sum as "loss", and its terms as "instance" and, without λ, "prior"."""
        stream = self.inputs.instances
        batch = stream.batch(sample_index, count)
        class_prompts = [
            stream.examples.class_prompt(variant, stream.seed, index, 0)
            for variant, index in zip(batch.variants, range(sample_index, sample_index + count), strict=True)
        ]
        with torch.no_grad():
            base_prediction = self.inputs.bare(batch.noisy, batch.times, class_prompts, batch.frames)
        noisy, times = torch.cat([batch.noisy] * 2), torch.cat([batch.times] * 2)
        both = predict(noisy, times, batch.prompts + class_prompts, batch.frames * 2)
        instance = batch.loss(stream.process, both[:count])
        prior = stream.process.loss_per_sample(both[count:], base_prediction, batch.times).mean()
        return {"loss": instance + self.inputs.prior_weight * prior, "instance": instance, "prior": prior}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.inputs.instances.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind(
    "prior-prediction",
    "A subject, with the class preserved by the prediction of the base.",
    PriorPrediction,
    bare_predictions=1,
)
