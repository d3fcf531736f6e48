"""Class drift: how far an adapter moves pictures that do not ask for what it has learned."""

from diffgraft.evaluation.evidence import Estimator, Evidence, flat, mean_over
from diffgraft.evaluation.measure import Measure


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean distance of the pictures of class prompts with and without the adapter, at the same seeds."""
    own, bare = (
        evidence.encoders.pictures("clip", flat(drawings.of_class)) for drawings in (evidence.drawn, evidence.bare)
    )
    return mean_over(1 - (own.double() * bare.double()).sum(1).view(-1, evidence.drawn.seeds))


MEASURE = Measure(
    name="drift",
    title="class drift",
    summary="Mean of 1 − cosine of CLIP's embeddings of pictures of the class without the trigger, with the adapter "
    "and by the base alone, at the same seeds.",
    better="lower",
    estimator=estimator,
    encoder="clip",
    role="drift",
)
