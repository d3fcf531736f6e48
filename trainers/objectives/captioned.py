"""The captioned objective: denoise pictures under their own prompts."""

from dataclasses import dataclass

from torch import Tensor

from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


@dataclass(frozen=True)
class Captioned:
    """E‖ε − ε_θ(x_t, t, prompt)‖² over the pictures; for other bases with v or the flow instead of ε."""

    inputs: ObjectiveInputs

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` samples as "loss"."""
        stream = self.inputs.instances
        batch = stream.batch(sample_index, count)
        prediction = predict(batch.noisy, batch.times, batch.prompts, batch.frames)
        return {"loss": batch.loss(stream.process, prediction)}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.inputs.instances.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind("captioned", "Pictures under their own prompts.", Captioned)
