"""The captioned objective: denoise pictures under their own prompts."""

from dataclasses import dataclass

from torch import Tensor

from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


@dataclass(frozen=True)
class Captioned:
    """E‖ε − ε_θ(x_t, t, prompt)‖² over the pictures (or the same in v, or of the flow)."""

    inputs: ObjectiveInputs

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """The mean loss of `count` samples, under "loss"."""
        line = self.inputs.instances
        batch = line.batch(place, count)
        prediction = predict(batch.noisy, batch.times, batch.prompts, batch.frames)
        return {"loss": batch.loss(line.process, prediction)}

    def names(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures from `place` on."""
        return self.inputs.instances.names(place, count)


OBJECTIVE = ObjectiveKind("captioned", "Pictures under their own prompts.", Captioned)
