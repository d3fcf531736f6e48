"""Numbers that overflow are refused, and leave no black pictures behind."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base, load_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.sampling import OverflowedPictureError
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.drawing import generate
from tests.recipes import SUBJECT


@pytest.mark.parametrize("guidance", [float("inf"), float("-inf"), float("nan")])
def test_guidance_is_a_number(base: Base, guidance: float) -> None:
    with pytest.raises(DiffgraftError, match="Invalid value guidance"):
        generate(base, ["a dog"], DrawSettings(guidance=guidance, steps=2), [1])


def test_a_picture_of_no_numbers_is_not_drawn(base: Base) -> None:
    weight = next(base.unet.parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(DiffgraftError, match=r"overflowed in step 1 of 3.*conv_in.* has NaN or infinity"):
            generate(base, ["a dog"], DrawSettings(steps=3), [1])
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_strengths_that_overflow_are_refused_as_well(base: Base, short_run: Run) -> None:
    adapter: Adapter = short_run.adapter
    with graft(base, {adapter: 1e30}), pytest.raises(DiffgraftError, match="overflowed in step 1 of 2"):
        generate(base, ["a dog"], DrawSettings(steps=2), [1])


def test_training_goes_on_without_samples_that_overflow(
    base: Base, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: Any, **__: Any) -> None:
        raise OverflowedPictureError("Latents overflowed.")

    monkeypatch.setattr("diffgraft.trainers.hooks.samples.Session.draw_each", overflow)
    settings: dict[str, Any] = {**SHORT, "steps": 2, "sample_every": 1, "prior": {"weight": 0}, "previews": True}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = train(SUBJECT, base=base, images=pictures, output=tmp_path / "run", **settings)
    said = [str(one.message) for one in seen]
    assert said == [
        "Samples of step 1 are missing. Latents overflowed.",
        "Samples of step 2 are missing. Latents overflowed.",
        "before-after.png is missing. Latents overflowed.",
    ]
    assert run.steps == 2
    assert run.adapter.deltas
    assert not run.before_after.exists()


def test_a_schedule_that_ends_in_noise_goes_with_no_prediction_of_noise() -> None:
    """The embedded base has such a schedule: from its last step a prediction of ε leads to infinity."""
    with pytest.raises(DiffgraftError, match=r"predicts ε cannot have zero_snr=true.*zero_snr=false"):
        load_base("tiny", prediction_type="epsilon")
    assert load_base("tiny", prediction_type="epsilon", zero_snr=False).prediction_type == "epsilon"
