"""CLIP-T: the cosine of pictures and their prompts in the space of a CLIP."""

import torch
from torch import Tensor

from diffgraft.evaluation.evidence import Evidence, flat, mean_over
from diffgraft.evaluation.measure import Measure


def cosines(evidence: Evidence, task: str) -> Tensor:
    """Return the cosine of each drawn picture and its prompt without the trigger, [prompts, seeds]."""
    seeds = evidence.drawn.seeds
    drawn = evidence.encoders.pictures(task, flat(evidence.drawn.trained))
    texts = evidence.encoders.texts(task, evidence.prompts.plain)
    return torch.einsum("psd,pd->ps", drawn.view(len(texts), seeds, -1), texts)


MEASURE = Measure(
    name="clip-t",
    title="CLIP-T",
    summary="Mean cosine of CLIP's embeddings of drawn pictures and of their prompts without the trigger (DreamBooth, "
    "arXiv:2208.12242).",
    better="higher",
    estimator=lambda evidence: mean_over(cosines(evidence, "clip")),
    encoder="clip",
)
