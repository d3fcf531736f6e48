"""Alignment: pictures that show more of what their prompts say, by the judgement of a CLIP.

The step is that of ReFL (Xu et al. 2023, arXiv:2304.05977, algorithm 1), with a CLIP (Radford et al. 2021,
arXiv:2103.00020) in place of a learned reward. The clean latents that the prediction implies are decoded, and the
picture is drawn towards its prompt in the space of CLIP:

    1 − cos(CLIP(decode(x̂₀)), CLIP(prompt)) + λ · ‖prediction(x_t) − base(x_t)‖²

The second term bounds the distance from the base. Without it, pictures may turn into patterns that please the CLIP
alone.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.clip import Clip, check_clip, clip_bytes, load_clip
from diffgraft.errors import DiffgraftError
from diffgraft.strict import Strict
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.objective import ObjectiveInputs, ObjectiveKind


class AlignOptions(Strict):
    """Options of the objective `align`: `loss.options.NAME=VALUE`."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP that judges: a hub id, a folder, or `tiny`"""
    prior: float = Field(1.0, gt=0, le=10_000)
    """Weight λ of the distance from the base's prediction; the larger, the closer the adapter stays to the base"""
    signal: float = Field(0.3, ge=0, lt=1)
    """Share α² of the picture in the variance of its latents from which on the predicted picture is judged; noisier
    samples only have the second term, as pictures predicted for them are a blur"""


def decoded(base: Base, latents: Tensor) -> Tensor:
    """Decode latents [n, c, h, w] to pictures [n, 3, height, width] with values from 0 to 1; gradients flow through.

    The decoder keeps only the inputs of its blocks, and computes them again for gradients.
    """
    base.vae.enable_gradient_checkpointing()
    try:
        pictures = base.family.decode(base, latents)
    finally:
        base.vae.disable_gradient_checkpointing()
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


class Align:
    """E[1 − cos(CLIP(decode(x̂₀)), CLIP(prompt))] + λ · E‖prediction(x_t, prompt) − base(x_t, prompt)‖²."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        if inputs.base is None:
            raise DiffgraftError("loss.objective=align decodes pictures, and needs a base with a VAE.")
        self.stream, self.bare, self.base = inputs.instances, inputs.bare, inputs.base
        self.options: AlignOptions = inputs.options
        self.clip: Clip = load_clip(self.options.clip).to(inputs.base.device)

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        """Return the mean loss of `count` samples as "loss", and its two terms.

        "distance" is the mean of 1 − cosine over the samples that are judged, 0 if none is; "drift" is the mean error
        against the base's prediction.
        """
        batch = self.stream.batch(sample_index, count)
        inputs = batch.noisy, batch.times, batch.prompts, batch.frames
        process = self.stream.process
        with torch.no_grad():
            bare = self.bare(*inputs)
        prediction = predict(*inputs)
        drift = process.loss_per_sample(prediction, bare, batch.times, batch.mask)
        distance = torch.zeros_like(drift)
        judged = (process.parameterization.signal(batch.times) >= self.options.signal).nonzero().flatten()
        if len(judged):
            x0 = process.parameterization.x0(batch.noisy[judged], prediction[judged], batch.times[judged])
            distance = distance.index_put((judged,), self._distances(x0, [batch.prompts[row] for row in judged]))
        loss = ((distance + self.options.prior * drift) * batch.weight).mean()
        return {"loss": loss, "distance": distance.sum() / max(1, len(judged)), "drift": drift.mean()}

    def _distances(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return 1 − cosine of the pictures of `latents` [n, c, h, w] and n prompts, [n]."""
        with torch.no_grad():
            wanted = self.clip.text_features(prompts)
        return 1 - (self.clip.image_features(decoded(self.base, latents)) * wanted).sum(-1)

    def picture_names(self, sample_index: int, count: int) -> list[str]:
        """Return the names of the pictures of `count` samples."""
        return self.stream.picture_names(sample_index, count)


def _check(options: AlignOptions, base: Base) -> None:
    """Check that the CLIP can be found, and that the base has a VAE with a decoder that gradients flow through.

    Raises:
        DiffgraftError: the CLIP does not exist, or pictures of the base's family cannot be aligned.
    """
    if not getattr(base.vae, "_supports_gradient_checkpointing", False):
        raise DiffgraftError(
            f"loss.objective=align has no meaning for bases of the family {base.family.name}: it needs a VAE of "
            "diffusers, through whose decoder gradients flow. Choose another objective."
        )
    check_clip(options.clip)


OBJECTIVE = ObjectiveKind(
    "align",
    "Pictures that show more of what their prompts say, as a CLIP judges.",
    Align,
    options=AlignOptions,
    check=_check,
    bare_predictions=1,
    uses_prior=False,
    needs_prompts=True,
    draws_pictures=True,
    uses_vae=True,
    own_bytes=lambda options: clip_bytes(options.clip),
    own_hash=lambda options: load_clip(options.clip).hash,
)
