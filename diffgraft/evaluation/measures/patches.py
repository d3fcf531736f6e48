"""Matched patches: how well each patch of the subject in a reference is found again in a drawn picture."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffgraft.evaluation.encoders import Encoder
from diffgraft.evaluation.evidence import Estimator, Evidence, flat, mean_over
from diffgraft.evaluation.matching import patch_match
from diffgraft.evaluation.measure import Measure
from diffgraft.generation.metadata import pixel_hash


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean over drawn pictures of their match with all references, in both directions with a masker."""
    encoders, references = evidence.encoders, evidence.references
    encoder = encoders.of("patches")
    known = encoder.patches([reference.image for reference in references])
    inside = [
        torch.ones(len(patches)) if reference.mask is None else _inside(encoder, reference.mask)
        for reference, patches in zip(references, known, strict=True)
    ]

    def match(images: Sequence[Image.Image]) -> list[Tensor]:
        scores = []
        for image, patches in zip(images, encoder.patches(images), strict=True):
            there = _inside(encoder, encoders.masker(image)) if encoders.masker is not None else None
            values = [patch_match(own, shares, patches, there) for own, shares in zip(known, inside, strict=True)]
            scores.append(torch.tensor(values, dtype=torch.float64).mean())
        return scores

    kind = " ".join(["match", *(pixel_hash(reference.image) for reference in references)])
    found = encoders.once("patches", kind, flat(evidence.drawn.trained), match)
    return mean_over(torch.stack(found).view(-1, evidence.drawn.seeds))


def _inside(encoder: Encoder, mask: Image.Image) -> Tensor:
    """Return the share of each patch inside a mask; all of them where the mask is empty, as none was found."""
    (shares,) = encoder.coverage([mask])
    return shares if shares.sum() > 0 else torch.ones_like(shares)


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
