"""Held-out loss: the error of predictions for pictures that were not trained on, at fixed noise."""

from diffgraft.evaluation.evidence import Estimator, Evidence, mean_over
from diffgraft.evaluation.measure import Measure


def estimator(evidence: Evidence) -> Estimator:
    """Return the mean of the losses at several sets of noise."""
    assert evidence.losses is not None
    return mean_over(evidence.losses[None])


MEASURE = Measure(
    name="held-out",
    title="held-out loss",
    summary="Mean squared error of predictions for held-out pictures, at timesteps and noise that are the same for all "
    "adapters.",
    better="lower",
    estimator=estimator,
    needs_losses=True,
)
