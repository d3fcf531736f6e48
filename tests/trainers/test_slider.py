"""Concept sliders: the loss against numpy in float64, attributes, and pictures that the base draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.bases import Base, SizeConditioning
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import check_objective, new_objective, objective_prompts
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data import build
from diffgraft.trainers.training_data.build import build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from tests.trainers.test_objectives import CPU, examples

AXIS = {"positive": "night", "negative": "a snowy day", "guidance": 3.0}
WORDS = ("prompt 0", "prompt 1", "prompt 2", "prompt 3", "prompt 4", "night", "a snowy day", "cat", "dog")


def meaning(prompt: str) -> float:
    """A number for each prompt of these tests: the sum over its parts."""
    return sum(0.1 * (1 + WORDS.index(part)) ** 2 for part in prompt.split(", "))


def predicting(factor: Any, asked: list[str]) -> Any:
    """A denoiser that is known in closed form; it keeps the prompts that it is asked for."""

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning]) -> Tensor:
        assert len(prompts) == len(frames) == len(noisy) == len(times)
        asked.extend(prompts)
        words = torch.tensor([meaning(prompt) for prompt in prompts]).view(-1, 1, 1, 1)
        prediction: Tensor = factor * noisy + times.view(-1, 1, 1, 1) / 1000 + words * noisy.square()
        return prediction

    return predict


@pytest.mark.parametrize("preserve", [[], ["cat", "dog"]])
def test_the_loss_is_the_formula(base: Base, preserve: list[str]) -> None:
    stream = SampleStream(examples(5, 1, weight=0.5), forward_process(base), 9, CPU)
    factor = torch.tensor(0.3, requires_grad=True)
    ours: list[str] = []
    theirs: list[str] = []
    given = ObjectiveInputs(stream, None, 0.0, predicting(0.2, theirs))
    objective = new_objective("slider", given, {**AXIS, "preserve": preserve})
    found = objective.losses(predicting(factor, ours), 21, 3)
    batch = stream.batch(21, 3)
    attributes = [f", {preserve[index % 2]}" for index in (21, 22, 23)] if preserve else [""] * 3
    targets = [prompt + attribute for prompt, attribute in zip(batch.prompts, attributes, strict=True)]
    shifts = [meaning(f"night{attribute}") - meaning(f"a snowy day{attribute}") for attribute in attributes]
    assert ours == targets
    assert theirs[:3] == targets
    assert theirs[3:6] == [f"night{attribute}" for attribute in attributes]
    x = batch.noisy.double().numpy()
    shift = np.array(shifts)[:, None, None, None] * x**2  # of what the base predicts
    error = 0.1 * x - 3.0 * shift
    assert found["loss"].item() == pytest.approx(0.5 * (error**2).mean(), rel=1e-5)
    assert found["base"].item() == pytest.approx(0.5 * (9.0 * shift**2).mean(), rel=1e-5)
    found["loss"].backward()
    assert factor.grad is not None
    assert factor.grad.item() == pytest.approx(0.5 * (2 * error * x).mean(), rel=1e-5)
    assert objective.names(21, 3) == stream.names(21, 3)


def test_every_prompt_is_known_before_training() -> None:
    options = {**AXIS, "preserve": "cat | dog"}
    asked = objective_prompts("slider", options, ["prompt 1"])
    assert sorted(asked) == sorted(
        f"{prompt}, {word}" for prompt in ("prompt 1", "night", "a snowy day") for word in ("cat", "dog")
    )
    assert set(objective_prompts("slider", AXIS, ["prompt 1"])) == {"prompt 1", "night", "a snowy day"}
    assert list(objective_prompts("slider", {"positive": "night", "preserve": ["cat"]}, ["a"]))[2] == "cat"


def test_an_axis_has_two_ends() -> None:
    for options in ({}, {"positive": "night", "negative": "night"}):
        with pytest.raises(DiffgraftError, match="positive and negative must be prompts that differ"):
            check_objective("slider", options)
    with pytest.raises(DiffgraftError, match=r"Invalid value loss\.options\.guidance=0"):
        check_objective("slider", {**AXIS, "guidance": 0})


def test_the_base_draws_the_pictures_of_the_prompt(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "DRAWN", 3)
    recipe, concepts = read_concepts(load_recipe("slider", {"prompt": "a cat"}))
    assert [pictures for _, pictures in concepts] == [[]]
    data = build_training_data(recipe.data, recipe.validation, recipe.seed, base, concepts)
    assert data.prompts == ["a cat"]
    assert len({example.content for example in data.instances.examples}) == 3
    again = build_training_data(recipe.data, recipe.validation, recipe.seed, base, concepts)
    assert again.digest == data.digest


def test_pictures_of_ones_own_take_their_place(base: Base, pictures: Path) -> None:
    recipe, concepts = read_concepts(load_recipe("slider", {"images": str(pictures)}))
    data = build_training_data(recipe.data, recipe.validation, recipe.seed, base, concepts)
    assert len(data.instances.examples) == 5
    assert data.class_images is None


def test_other_objectives_need_pictures() -> None:
    with pytest.raises(DiffgraftError, match="has no images: add images=FOLDER"):
        plan_run("slider", {"loss.objective": "captioned", "loss.options": {}})


def test_a_plan_needs_no_pictures_either() -> None:
    lines = dict(line.split("  ", 1) for line in plan_run("slider", {}).lines() if "  " in line)
    assert lines["images"].strip() == "64"
    assert "for the pictures that the base draws" in lines["time"]
    assert not any("look at" in line for line in lines)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("ia3", {}), ("textual-inversion", {"trigger": "<sks>", "prompt": "a dog, <sks>"})],
)
def test_every_method_moves_along_the_axis(
    method: str, settings: dict[str, Any], base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "DRAWN", 4)
    short = {"steps": 6, "batch": 2, "lr": 5e-3, "warmup": 0, "checkpoint_every": 0}
    run = train("slider", base=base, output=tmp_path / "run", method=method, **short, **settings)
    first, *_, last = run.metrics
    assert first["loss"] == pytest.approx(first["base"], rel=1e-5)
    assert last["loss"] < last["base"]
    assert run.adapter_file.is_file()
