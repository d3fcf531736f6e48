"""The DreamBooth objective: a subject's pictures under its trigger, and the class kept as it was.

Ruiz et al. 2022 (arXiv:2208.12242), equation 2: L = L_instance + λ · L_prior, where the second term is over pictures
of the class that the frozen base drew itself.
"""

import torch
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


class DreamBooth:
    """Instance and class pictures, in one pass of the denoiser where their latents are of one size."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        if inputs.classes is None:
            raise DiffgraftError(
                "objective=dreambooth needs pictures of the class: set prior.weight above 0 and prior.by=pictures."
            )
        self.instances, self.classes = inputs.instances, inputs.classes

    def losses(self, predict: Predict, place: int, count: int) -> dict[str, Tensor]:
        """Under "loss" L_instance + λ · L_prior; the two terms stand beside it, the second without its λ."""
        instances, classes = self.instances.batch(place, count), self.classes.batch(place, count)
        if instances.noisy.shape == classes.noisy.shape:
            noisy = torch.cat([instances.noisy, classes.noisy])
            times = torch.cat([instances.times, classes.times])
            both = predict(noisy, times, instances.prompts + classes.prompts, instances.frames + classes.frames)
            of_instances, of_classes = both[:count], both[count:]
        else:
            of_instances = predict(instances.noisy, instances.times, instances.prompts, instances.frames)
            of_classes = predict(classes.noisy, classes.times, classes.prompts, classes.frames)
        instance = instances.loss(self.instances.process, of_instances)
        prior = self.classes.process.loss_per_sample(of_classes, classes.target, classes.times)
        return {"loss": instance + (prior * classes.weight).mean(), "instance": instance, "prior": prior.mean()}

    def names(self, place: int, count: int) -> list[str]:
        """Names of the `count` pictures from `place` on, and of as many class images."""
        return self.instances.names(place, count) + self.classes.names(place, count)


OBJECTIVE = ObjectiveKind("dreambooth", "A subject, with pictures of its class beside it.", DreamBooth)
