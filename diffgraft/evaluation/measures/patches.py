"""Matched patches: how well each patch of the subject in a reference is found again in a drawn picture."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffgraft.evaluation.evidence import Estimator, Evidence, flat, mean_over
from diffgraft.evaluation.matching import patch_match
from diffgraft.evaluation.measure import Measure
from diffgraft.generation.metadata import pixel_hash


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean over drawn pictures of their match with all references."""
    encoders, references = evidence.encoders, evidence.references
    encoder = encoders.of("patches")
    known = encoder.patches([reference.image for reference in references])
    inside = [
        torch.ones(len(patches)) if reference.mask is None else encoder.coverage([reference.mask])[0]
        for reference, patches in zip(references, known, strict=True)
    ]
    # a mask smaller than any patch counts as none
    inside = [shares if shares.sum() > 0 else torch.ones_like(shares) for shares in inside]

    def match(images: Sequence[Image.Image]) -> list[Tensor]:
        scores = []
        for patches in encoder.patches(images):
            values = [patch_match(own, shares, patches) for own, shares in zip(known, inside, strict=True)]
            scores.append(torch.tensor(values, dtype=torch.float64).mean())
        return scores

    kind = " ".join(["match", *(pixel_hash(reference.image) for reference in references)])
    found = encoders.once("patches", kind, flat(evidence.drawn.trained), match)
    return mean_over(torch.stack(found).view(-1, evidence.drawn.seeds))


MEASURE = Measure(
    name="patches",
    title="patches",
    summary="Mean over the patches of the references' subjects, inside their masks, of the best cosine among the "
    "patches of a drawn picture (MaSC 2026, arXiv:2605.22469).",
    better="higher",
    estimator=estimator,
    encoder="patches",
    role="likeness",
    least_references=1,
)
