"""Direct preference optimization of diffusion models: pictures that are preferred to others (Diffusion-DPO).

Wallace et al. 2023, arXiv:2311.12908, equation 14. The adapter is to lower the error of a preferred picture x⁺ by more
than that of a rejected one x⁻ under the same prompt, both measured against the base without the adapter:

    d(x) = ‖target − prediction(x_t)‖² − ‖target − base(x_t)‖²        loss: −log σ(−β · (d(x⁺) − d(x⁻)))

Both pictures of a pair have the same noise and timestep.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from diffgraft.errors import DiffgraftError
from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind, PairKind


class PreferenceOptions(Strict):
    """Options of the objective `preference`: `loss.options.NAME=VALUE`."""

    beta: float = Field(2500, gt=0, le=1_000_000)
    """Scale β of the difference of errors; the larger, the closer the adapter stays to the base"""


class Preference:
    """−log σ(β · margin), where the margin is by how much more the adapter helps the preferred picture.

    As in diffusers' script, errors are means over a picture's latents, and β includes the number of timesteps and the
    constant weight of the paper. The authors' code halves its β.
    """

    def __init__(self, inputs: ObjectiveInputs) -> None:
        if inputs.partners is None:
            raise DiffgraftError(
                "loss.objective=preference needs pairs: put a rejected picture for each preferred one, of the same "
                "name, into the folder `rejected` beside them."
            )
        self.preferred, self.rejected = inputs.instances, inputs.partners
        self.bare, self.beta = inputs.bare, inputs.options.beta

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` pairs as "loss".

        Further terms are "accuracy", the share of pairs with a margin above 0 (0 counts half), and "preferred" and
        "rejected", the mean errors of the pictures.
        """
        batch, other = self.preferred.batch(sample_index, count), self.rejected.batch(sample_index, count)
        both = (
            torch.cat([batch.noisy, other.noisy]),
            torch.cat([batch.times] * 2),
            batch.prompts * 2,
            batch.frames * 2,
        )
        target = torch.cat([batch.target, other.target])
        mask = None if batch.mask is None else torch.cat([batch.mask] * 2)

        def errors(prediction: Tensor) -> Tensor:
            squared = (prediction - target).square()
            return (squared if mask is None else squared * mask).flatten(1).mean(1)

        with torch.no_grad():
            reference = errors(self.bare(*both))
        own = errors(predict(*both))
        preferred, rejected = (own - reference).chunk(2)
        margin = rejected - preferred
        loss = (-F.logsigmoid(self.beta * margin) * batch.weight).mean()
        accuracy = (margin.sign() / 2 + 0.5).mean()
        means = dict(zip(("preferred", "rejected"), own.view(2, -1).mean(1), strict=True))
        return {"loss": loss, "accuracy": accuracy, **means}

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the preferred pictures of `count` pairs."""
        return self.preferred.picture_names(sample_index, count)


OBJECTIVE = ObjectiveKind(
    "preference",
    "Pictures that are preferred to others (Diffusion-DPO).",
    Preference,
    options=PreferenceOptions,
    predictions=2,
    bare_predictions=2,
    has_own_error=True,
    uses_prior=False,
    pairs=PairKind("preferred", "rejected"),
)
