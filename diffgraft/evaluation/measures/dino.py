"""DINO: the cosine of pictures and references in the space of DINOv2, which tells subjects of one class apart."""

from diffgraft.evaluation.measure import Measure
from diffgraft.evaluation.measures.clip_i import likeness

MEASURE = Measure(
    name="dino",
    title="DINO",
    summary="Mean cosine of DINOv2's embeddings of drawn pictures and references (DreamBooth, arXiv:2208.12242).",
    better="higher",
    estimator=lambda evidence: likeness(evidence, "dino"),
    encoder="dino",
    role="likeness",
    least_references=1,
)
