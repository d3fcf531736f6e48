"""Numbers that overflow are refused, and leave no black pictures behind."""

import pytest
import torch

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.generate import Settings, generate
from diffgraft.generation.graft import graft
from diffgraft.trainers.folder import Run


@pytest.mark.parametrize("guidance", [float("inf"), float("-inf"), float("nan")])
def test_guidance_is_a_number(base: Base, guidance: float) -> None:
    with pytest.raises(DiffgraftError, match="cannot be drawn with"):
        generate(base.pipeline(), ["a dog"], Settings(guidance=guidance, steps=2), [1])


def test_a_picture_of_no_numbers_is_not_drawn(base: Base) -> None:
    weight = next(base.unet.parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(DiffgraftError, match="overflowed in step 1 of 3"):
            generate(base.pipeline(), ["a dog"], Settings(steps=3), [1])
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_strengths_that_overflow_are_refused_as_well(base: Base, short_run: Run) -> None:
    adapter: Adapter = short_run.adapter
    with graft(base, {adapter: 1e30}), pytest.raises(DiffgraftError, match="overflowed in step 1 of 2"):
        generate(base.pipeline(), ["a dog"], Settings(steps=2), [1])
