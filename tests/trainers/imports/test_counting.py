"""Epochs as steps: part of a batch is a batch, and part of an accumulation is an update, as those tools count."""

import pytest

from diffgraft.imports.counting import Epochs


@pytest.mark.parametrize(
    ("pictures", "batch", "accumulate", "epochs", "steps"),
    [(5, 2, 1, 3, 9), (5, 2, 2, 3, 6), (7, 3, 2, 0.6, 2), (1, 4, 8, 0.1, 1), (None, 2, 1, 3, None), (0, 2, 1, 3, None)],
)
def test_steps(pictures: int | None, batch: int, accumulate: int, epochs: float, steps: int | None) -> None:
    assert Epochs(pictures, batch, accumulate).steps(epochs) == steps
