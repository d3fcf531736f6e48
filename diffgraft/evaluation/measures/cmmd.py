"""CMMD: the distance between the drawn pictures and the references as sets, by a Gaussian kernel."""

from diffgraft.evaluation.kernels import gaussian
from diffgraft.evaluation.measure import Measure
from diffgraft.evaluation.measures.kid import distance

MEASURE = Measure(
    name="cmmd",
    title="CMMD",
    summary="1000 times the unbiased MMD² between drawn pictures and references by a Gaussian kernel of width 10 on "
    "CLIP's embeddings (after Jayasumana et al. 2024, arXiv:2401.09603, which takes the biased estimate).",
    better="lower",
    estimator=lambda evidence: distance(evidence, gaussian, 1000.0),
    encoder="clip",
    least_references=2,
    least_seeds=3,
    is_default=False,
)
