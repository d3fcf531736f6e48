"""Diversity: how different pictures of one prompt are."""

import math
from collections.abc import Sequence

import torch

from diffgraft.evaluation.evidence import Estimator, Evidence, Rows, flat
from diffgraft.evaluation.measure import Measure


def mean_distance(evidence: Evidence, rows: Rows) -> Estimator:
    """Return the mean of 1 − cosine of all pairs of pictures of the same prompt; NaN for a single seed."""
    drawn = evidence.encoders.pictures("clip", flat(rows)).double().view(len(rows), len(rows[0]), -1)
    distances = 1 - torch.einsum("psd,ptd->pst", drawn, drawn)

    def mean_of_pairs(kept: Sequence[int]) -> float:
        few = distances[:, list(kept)][:, :, list(kept)]
        pairs = len(few) * len(kept) * (len(kept) - 1) / 2
        return float(few.triu(1).sum() / pairs) if pairs else math.nan

    return mean_of_pairs


MEASURE = Measure(
    name="diversity",
    title="diversity",
    summary="Mean of 1 − cosine of CLIP's embeddings of two pictures of the same prompt; an adapter that has learned "
    "its pictures by heart draws them again, with less of it.",
    better="higher",
    estimator=lambda evidence: mean_distance(evidence, evidence.drawn.trained),
    encoder="clip",
    role="diversity",
    least_seeds=3,
)
