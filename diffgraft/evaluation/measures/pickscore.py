"""PickScore: a CLIP that was trained on people's choices between pictures of a prompt."""

from diffgraft.evaluation.evidence import Estimator, Evidence, mean_over
from diffgraft.evaluation.measure import Measure
from diffgraft.evaluation.measures.clip_t import cosines


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean of the scaled cosine of each drawn picture and its prompt."""
    return mean_over(cosines(evidence, "pickscore") * evidence.encoders.of("pickscore").logit_scale)


MEASURE = Measure(
    name="pickscore",
    title="PickScore",
    summary="How much people would like pictures for their prompts: the scaled cosine of a CLIP trained on their "
    "choices (Kirstain et al. 2023, arXiv:2305.01569).",
    better="higher",
    estimator=estimator,
    encoder="pickscore",
    is_default=False,
)
