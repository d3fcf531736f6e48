"""KID: the distance between the drawn pictures and the references as sets, by a cubic kernel."""

from diffgraft.evaluation.evidence import Estimator, Evidence, flat
from diffgraft.evaluation.kernels import Kernel, cubic, mmd2
from diffgraft.evaluation.measure import Measure


def distance(evidence: Evidence, kernel: Kernel, factor: float) -> Estimator:
    """Return a factor times MMD² of CLIP's embeddings of drawn pictures and references, by a kernel."""
    seeds = evidence.drawn.seeds
    drawn = evidence.encoders.pictures("clip", flat(evidence.drawn.trained))
    drawn = drawn.view(-1, seeds, drawn.shape[1])
    references = evidence.encoders.pictures("clip", [reference.image for reference in evidence.references])
    return lambda kept: factor * mmd2(drawn[:, list(kept)].flatten(0, 1), references, kernel)


MEASURE = Measure(
    name="kid",
    title="KID × 1000",
    summary="Unbiased MMD² between drawn pictures and references by the kernel (cosine + 1)³ on CLIP's embeddings "
    "(after Bińkowski et al. 2018, arXiv:1801.01401, which has Inception's features).",
    better="lower",
    estimator=lambda evidence: distance(evidence, cubic, 1000.0),
    encoder="clip",
    least_references=2,
    least_seeds=3,
    is_default=False,
)
