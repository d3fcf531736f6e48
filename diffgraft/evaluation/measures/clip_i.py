"""CLIP-I: the cosine of pictures and references in the space of a CLIP."""

from diffgraft.evaluation.evidence import Estimator, Evidence, flat, mean_over
from diffgraft.evaluation.measure import Measure


def likeness(evidence: Evidence, task: str) -> Estimator:
    """Return the mean cosine of each drawn picture and each reference, by the encoder of a task."""
    drawn = evidence.encoders.pictures(task, flat(evidence.drawn.trained))
    references = evidence.encoders.pictures(task, [reference.image for reference in evidence.references])
    scores = (drawn @ references.T).mean(1)
    return mean_over(scores.view(-1, evidence.drawn.seeds))


MEASURE = Measure(
    name="clip-i",
    title="CLIP-I",
    summary="Mean cosine of CLIP's embeddings of drawn pictures and references (DreamBooth, arXiv:2208.12242).",
    better="higher",
    estimator=lambda evidence: likeness(evidence, "clip"),
    encoder="clip",
    role="likeness",
    least_references=1,
)
