"""The DreamBooth objective: pictures of a subject under its trigger, and class images that preserve the class.

Ruiz et al. 2022 (arXiv:2208.12242), equation 2: L = L_instance + λ · L_prior, where the second term is over class
images that the frozen base generated.
"""

import torch
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


class DreamBooth:
    """Loss on instance pictures and class images, in one pass of the denoiser where their latents have one size."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        if inputs.classes is None:
            raise DiffgraftError(
                "loss.objective=dreambooth needs class images: set prior.weight above 0 and prior.by=pictures."
            )
        self.instances, self.classes = inputs.instances, inputs.classes

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return L_instance + λ · L_prior as "loss", and its terms as "instance" and, without λ, "prior"."""
        instances, classes = self.instances.batch(sample_index, count), self.classes.batch(sample_index, count)
        if instances.noisy.shape == classes.noisy.shape:
            noisy = torch.cat([instances.noisy, classes.noisy])
            times = torch.cat([instances.times, classes.times])
            both = predict(noisy, times, instances.prompts + classes.prompts, instances.frames + classes.frames)
            instance_prediction, class_prediction = both[:count], both[count:]
        else:
            instance_prediction = predict(instances.noisy, instances.times, instances.prompts, instances.frames)
            class_prediction = predict(classes.noisy, classes.times, classes.prompts, classes.frames)
        instance = instances.loss(self.instances.process, instance_prediction)
        prior = self.classes.process.loss_per_sample(class_prediction, classes.target, classes.times)
        return {"loss": instance + (prior * classes.weight).mean(), "instance": instance, "prior": prior.mean()}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples, and of as many class images."""
        return self.instances.picture_names(sample_index, count) + self.classes.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind("dreambooth", "A subject, with class images for prior preservation.", DreamBooth)
