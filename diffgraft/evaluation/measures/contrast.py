"""Prompt contrast: by how much pictures lie nearer to their own prompt than to the other prompts."""

import torch

from diffgraft.evaluation.evidence import Estimator, Evidence, flat, mean_over
from diffgraft.evaluation.measure import Measure


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean of a picture's cosine with its own prompt, less its mean cosine with the other prompts."""
    texts = evidence.encoders.texts("clip", list(dict.fromkeys(evidence.prompts.plain)))
    own = [list(dict.fromkeys(evidence.prompts.plain)).index(text) for text in evidence.prompts.plain]
    drawn = evidence.encoders.pictures("clip", flat(evidence.drawn.trained))
    cosines = (drawn @ texts.T).view(len(own), evidence.drawn.seeds, len(texts))
    right = torch.stack([cosines[row, :, place] for row, place in enumerate(own)])  # [prompts, seeds]
    others = (cosines.sum(2) - right) / max(1, len(texts) - 1)
    return mean_over(right - others if len(texts) > 1 else right)


MEASURE = Measure(
    name="contrast",
    title="follows prompts",
    summary="CLIP's cosine of drawn pictures and their own prompts, less that with the other prompts, all without the "
    "trigger; 0 for pictures that do not depend on the prompt, however the subject looks.",
    better="higher",
    estimator=estimator,
    encoder="clip",
    role="following",
)
