"""Structure: whether an adapter keeps the composition that the base gives a prompt at a seed."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffgraft.evaluation.evidence import Estimator, Evidence, Rows, flat, mean_over
from diffgraft.evaluation.measure import Measure


def self_similarity(patches: Tensor) -> Tensor:
    """Return the correlations of patches [n, d] with one another, as a centred unit vector [n · (n − 1) / 2]."""
    centred = F.normalize(patches.double() - patches.double().mean(0), dim=1)
    first, second = torch.triu_indices(len(patches), len(patches), 1)
    similarity = (centred @ centred.T)[first, second]
    return F.normalize(similarity - similarity.mean(), dim=0)


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean agreement with the base's picture at the same seed, less that with its pictures of other prompts.

    Pictures agree by the correlation of their patches' self-similarity, in which neither colours nor strokes count.
    """
    own, bare = (_vectors(evidence, drawings.trained) for drawings in (evidence.drawn, evidence.bare))
    agreement = torch.einsum("psd,qsd->pqs", own, bare)
    right = agreement.diagonal().T  # [prompts, seeds]
    others = (agreement.sum(1) - right) / max(1, len(own) - 1)
    return mean_over(right - others if len(own) > 1 else right)


def _vectors(evidence: Evidence, rows: Rows) -> Tensor:
    """Return the self-similarity of all pictures, [prompts, seeds, pairs]."""
    encoder = evidence.encoders.of("patches")

    def compute(images: Sequence[Image.Image]) -> list[Tensor]:
        return [self_similarity(patches).float() for patches in encoder.patches(images)]

    vectors = evidence.encoders.once("patches", "structure", flat(rows), compute)
    return torch.stack(vectors).view(len(rows), len(rows[0]), -1)


MEASURE = Measure(
    name="structure",
    title="keeps composition",
    summary="Correlation of the patches' self-similarity with the picture of the base at the same seed (after Tumanyan "
    "et al. 2022, arXiv:2201.00424), less that with the base's pictures of other prompts; 0 for pictures that do not "
    "depend on the prompt, in any style.",
    better="higher",
    estimator=estimator,
    encoder="patches",
    role="composition",
)
