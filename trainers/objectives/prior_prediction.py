"""Prior preservation without class images: under the class prompt the adapted base predicts what the bare one does.

In place of DreamBooth's own pictures of the class (Ruiz et al. 2022, arXiv:2208.12242, equation 2) stands what the
frozen base predicts for the instance pictures themselves, noise and timestep being the same: the distillation of
learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282).
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

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Under "loss" the sum; the two terms stand beside it, the second without its λ."""
        line = self.inputs.instances
        batch = line.batch(place, count)
        class_prompts = [
            line.examples.class_prompt(one, line.seed, at, 0)
            for one, at in zip(batch.shown, range(place, place + count), strict=True)
        ]
        with torch.no_grad():
            kept = self.inputs.bare(batch.noisy, batch.times, class_prompts, batch.frames)
        noisy, times = torch.cat([batch.noisy] * 2), torch.cat([batch.times] * 2)
        both = predict(noisy, times, batch.prompts + class_prompts, batch.frames * 2)
        instance = batch.loss(line.process, both[:count])
        prior = line.process.loss_per_sample(both[count:], kept, batch.times).mean()
        return {"loss": instance + self.inputs.prior_weight * prior, "instance": instance, "prior": prior}

    def names(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures from `place` on."""
        return self.inputs.instances.names(place, count)


OBJECTIVE = ObjectiveKind(
    "prior-prediction", "A subject, its class held to what the bare base predicts.", PriorPrediction
)
