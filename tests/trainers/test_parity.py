"""Training is the established one: it gives the losses and gradients of diffusers' example scripts.

``benchmarks/parity.py`` ran the scripts of diffusers v0.40.0 (commit d035dcd), in float32 on the embedded base, with
the noises, timesteps, order and initial values that our trainer draws; what they computed lies in ``parity/``.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity import CASES, KEPT, deviations, run_ours, summary
from diffgraft.bases import Base

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the numbers are of a processor; GPUs round otherwise"
)

TOLERANCE = 1e-5
AFTER_AN_UPDATE = 3e-4
"""Adam makes the rounding of a tiny gradient as large as a step, and the second gradients are taken after one."""


def found(kept: dict[str, Any], base: Base, folder: Path, **changed: Any) -> dict[str, float]:
    """How far our trainer is from a script's numbers, relative to them."""
    _, ours = run_ours(kept["recipe"], base, folder / "run", {**kept["settings"], **changed})
    return deviations(summary(ours), kept)


def read(case: str) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((KEPT / f"{case}.json").read_text("utf-8"))
    return kept


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_example_script(case: str, base: Base, tmp_path: Path) -> None:
    kept = read(case)
    assert (kept["recipe"], kept["settings"]) == CASES[case]
    assert len(kept["losses"]) == 20
    off = found(kept, base, tmp_path)
    assert off["losses"] < TOLERANCE
    assert off["gradients of step 1"] < TOLERANCE
    assert off["gradients of step 2"] < AFTER_AN_UPDATE


@pytest.mark.parametrize(
    ("changed", "sees"),
    [
        ({"lr": 1.001e-3}, "losses"),
        ({"alpha": 2.001}, "gradients of step 1"),
    ],
)
def test_it_would_be_seen_if_they_were_not(changed: dict[str, float], sees: str, base: Base, tmp_path: Path) -> None:
    """A thousandth more of the rate, or of the adapter's scale."""
    assert found(read("dreambooth-lora"), base, tmp_path, **changed)[sees] > 3 * TOLERANCE
