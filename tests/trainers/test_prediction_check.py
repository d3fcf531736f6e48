"""A base that predicts something else than it says is noticed before training, and where its adapters are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base, load_base
from diffgraft.data.captions import PromptBuilder
from diffgraft.data.frames import Crop
from diffgraft.data.latents import Encoded, Latents
from diffgraft.generation.graft import graft
from diffgraft.rng import normal
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.planning.prediction_check import prediction_cosines, prediction_warning
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.examples import Example, Examples
from tests.conftest import SHORT, UNETS, fresh
from tests.recipes import SUBJECT


def examples_of(latents: Tensor) -> Examples:
    """Pictures with these latents [n, c, h, w]."""
    height, width = latents.shape[-2] * 4, latents.shape[-1] * 4
    frames = [Crop((width, height), (width, height), (0, 0), (width, height))] * len(latents)
    encoded = Encoded(Latents([(one, torch.zeros_like(one)) for one in latents]), frames, [None] * len(latents), {})
    return Examples(encoded, [Example(f"{n}", range(n, n + 1), PromptBuilder(("",))) for n in range(len(latents))])


@contextmanager
def predicting(base: Base, patch: pytest.MonkeyPatch, what: str, latents: Tensor) -> Iterator[None]:
    """Within the block the base's UNet says exactly what one that predicts `what` should, or nothing sensible."""
    alphas = np.asarray(base.parameterization.alphas_cumprod, dtype=np.float64)

    def forward(noisy: Tensor, times: Tensor, **_: Any) -> SimpleNamespace:
        kept = alphas[int(times[0])]
        noise = (noisy.double().numpy() - kept**0.5 * latents.double().numpy()) / (1 - kept) ** 0.5
        said = {
            "epsilon": noise,
            "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * latents.double().numpy(),
            "chance": normal(noisy.shape, 77).double().numpy(),
        }[what]
        return SimpleNamespace(sample=torch.from_numpy(said).float())

    with patch.context() as now:
        now.setattr(base.unet, "forward", forward)
        yield


@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "chance"])
def test_what_a_base_predicts_is_seen(says: str, predicts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("tiny", prediction_type=says, zero_snr=False)
    latents = normal((3, 4, 12, 16), 5)
    with predicting(base, monkeypatch, predicts, latents):
        near = dict(zip(("epsilon", "v_prediction"), prediction_cosines(base, latents), strict=True))
        told = prediction_warning(base, examples_of(latents))
    if predicts == "chance":
        assert max(map(abs, near.values())) < 0.15
        assert told == ""
    else:
        assert near[predicts] == pytest.approx(1, abs=1e-4)
        assert (told == "") == (says == predicts)
        assert says == predicts or f"set prediction_type={predicts}" in told


@pytest.mark.parametrize("family", UNETS)
def test_bases_of_every_family_are_looked_at(family: str, folders: Path) -> None:
    base = fresh(folders / family)
    latents = normal((2, 4, 8, 16), 5)
    assert all(-0.5 < near < 0.5 for near in prediction_cosines(base, latents))  # of random weights
    assert prediction_warning(base, examples_of(latents)) == ""


@pytest.mark.usefixtures("real_prediction_check")
def test_training_and_drawing_tell_of_a_base_that_says_the_wrong_thing(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "steps": 1, "prior": {"weight": 0}, "sample_prompts": "a dog"}
    wrong = load_base("tiny", prediction_type="epsilon", zero_snr=False)
    with pytest.warns(UserWarning, match="prediction type epsilon, but seems to predict v_prediction"):
        run = train(SUBJECT, base=wrong, images=pictures, output=tmp_path / "run", **settings)
    right = load_base("tiny")
    with pytest.warns(UserWarning, match="trained on a base that predicts epsilon, but this one predicts v_pred"):
        graft(right, run.adapter_file).remove()
    assert run.adapter.metadata["base"]["prediction_type"] == "epsilon"
    graft(wrong, run.adapter_file).remove()
    graft(right, Adapter({}, metadata={"base": {"prediction_type": 3}})).remove()


def test_a_plan_names_what_the_base_predicts_and_who_says_so(pictures: Path) -> None:
    for settings, said in (
        ({}, "v_prediction, as its files say"),
        ({"prediction_type": "v_prediction"}, "as the recipe says"),
    ):
        facts = dict(plan_run(SUBJECT, {"images": pictures, "subject": "dog", **settings}).facts)
        assert said in facts["predicts"]
