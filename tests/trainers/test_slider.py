"""Concept sliders: the loss against numpy in float64, attributes, and pictures that the base draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.parity import Draws
from diffgraft.adapters.method import Spec
from diffgraft.adapters.patch import AttachedLayers
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, SizeConditioning
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import check_objective, new_objective, objective_prompts
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data import build
from diffgraft.trainers.training_data.build import build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from tests.adapters.toys import shake
from tests.trainers.test_objectives import CPU, examples
from tests.trainers.test_preference import drawn, of_type, picture, streams

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


@dataclass
class Scaled:
    """A denoiser known in closed form, whose adapter has a strength."""

    factor: Tensor
    strength: float = 1.0
    asked: list[tuple[float, list[str]]] = field(default_factory=list)

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        before, self.strength = self.strength, strength
        yield
        self.strength = before

    def __call__(self, noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[Any]) -> Tensor:
        self.asked.append((self.strength, [*prompts]))
        prediction: Tensor = predicting(0.2, [])(noisy, times, prompts, frames) + self.strength * self.factor * noisy
        return prediction


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("preserve", [[], ["cat", "dog"]])
def test_the_loss_is_the_formula(base: Base, preserve: list[str], both: bool) -> None:
    stream = SampleStream(examples(5, 1, weight=0.5), forward_process(base), 9, CPU)
    theirs: list[str] = []
    ours = Scaled(torch.tensor(0.1, requires_grad=True))
    given = ObjectiveInputs(stream, None, 0.0, predicting(0.2, theirs), at_strength=ours.at)
    objective = new_objective("slider", given, {**AXIS, "preserve": preserve, "both": both})
    found = objective.losses(ours, 21, 3)
    batch = stream.batch(21, 3)
    attributes = [f", {preserve[index % 2]}" for index in (21, 22, 23)] if preserve else [""] * 3
    targets = [prompt + attribute for prompt, attribute in zip(batch.prompts, attributes, strict=True)]
    shifts = [meaning(f"night{attribute}") - meaning(f"a snowy day{attribute}") for attribute in attributes]
    assert ours.asked == [(strength, targets) for strength in ((1, -1) if both else (1,))]
    assert ours.strength == 1
    assert theirs[:3] == targets
    assert theirs[3:6] == [f"night{attribute}" for attribute in attributes]
    x = batch.noisy.double().numpy()
    shift = np.array(shifts)[:, None, None, None] * x**2  # of what the base predicts
    error = 0.1 * x - 3.0 * shift  # that at strength −1 is the opposite
    assert found["loss"].item() == pytest.approx(0.5 * (error**2).mean(), rel=1e-5)
    assert found["base"].item() == pytest.approx(0.5 * (9.0 * shift**2).mean(), rel=1e-5)
    found["loss"].backward()
    assert ours.factor.grad is not None
    assert ours.factor.grad.item() == pytest.approx(0.5 * (2 * error * x).mean(), rel=1e-5)
    assert objective.picture_names(21, 3) == stream.picture_names(21, 3)


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_the_loss_of_pairs_is_the_formula(base: Base, strength: float) -> None:
    positive, negative = streams(base, 0.5)
    masks = [torch.rand(6, 5, generator=torch.Generator().manual_seed(row)) for row in range(5)]
    masked = replace(positive.examples, encoded=replace(positive.examples.encoded, masks=masks))
    positive = replace(positive, examples=masked)
    ours = Scaled(torch.tensor(0.1, requires_grad=True))
    given = ObjectiveInputs(positive, None, 0.0, predicting(0.2, []), negative, ours.at)
    objective = new_objective("picture-slider", given, {"strength": strength})
    found = objective.losses(ours, 21, 3)
    halves = positive.batch(21, 3), negative.batch(21, 3)
    assert torch.equal(halves[0].times, halves[1].times)
    assert not torch.equal(halves[0].noisy, halves[1].noisy)
    assert ours.asked == [(own, halves[0].prompts) for own in (strength, -strength)]
    assert halves[0].mask is not None
    mask, words = halves[0].mask.double().numpy(), np.array([meaning(one) for one in halves[0].prompts])
    losses, slopes = [], []
    for half, own in zip(halves, (strength, -strength), strict=True):
        x, target = half.noisy.double().numpy(), half.target.double().numpy()
        at = half.times.double().numpy()[:, None, None, None] / 1000
        error = (0.2 + own * 0.1) * x + at + words[:, None, None, None] * x**2 - target
        losses.append(0.5 * (mask * error**2).mean())
        slopes.append(0.5 * (mask * 2 * error * own * x).mean())
    assert found["positive"].item() == pytest.approx(losses[0], rel=1e-5)
    assert found["negative"].item() == pytest.approx(losses[1], rel=1e-5)
    assert found["loss"].item() == pytest.approx(sum(losses), rel=1e-5)
    found["loss"].backward()
    assert ours.factor.grad is not None
    assert ours.factor.grad.item() == pytest.approx(sum(slopes), rel=1e-4)
    assert objective.picture_names(21, 3) == positive.picture_names(21, 3)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_first_gradients_of_pairs_are_those_of_whole_weights(base: Base, predicts: str) -> None:
    """Against the UNet with weights W + ΔW for positive pictures, and W − ΔW for negative ones."""
    other = of_type(base, predicts)
    positive, negative = streams(other)
    paths = choose_layers("unet", base.unet, "attention")
    live = get_method("lora").attach(base, Spec({"unet": paths}, 3, 4.5, 5, get_method("lora").read_options({})))
    shake(live, size=0.05)
    assert isinstance(live, AttachedLayers)
    try:
        inputs = ObjectiveInputs(positive, None, 0.0, lambda *_: torch.zeros(1), negative, live.at_strength)
        draws = Draws()
        with draws.watch():
            terms = new_objective("picture-slider", inputs).losses(Denoiser(other, live), 20, 4)
        terms["loss"].backward()
        ours = {name: value.grad for name, value in live.trainable().items()}
        noisy, target, times = drawn(other, positive, negative, draws)
        tokens = base.tokenizer(draws.prompts[:4], padding="max_length", max_length=77, return_tensors="pt").input_ids
        leaves = {name: value.detach().clone().requires_grad_() for name, value in live.trainable().items()}
        with live.disabled():
            with torch.no_grad():
                states = base.text_encoder(tokens)[0]
            loss = torch.zeros((), dtype=torch.float64)
            for half, sign in ((slice(0, 4), 1.5), (slice(4, 8), -1.5)):  # times alpha / rank
                weights = {
                    f"{path}.weight": base.unet.get_submodule(path).weight
                    + sign * leaves[f"unet.{path}.lora_up"] @ leaves[f"unet.{path}.lora_down"]
                    for path in paths
                }
                given = noisy[half].float(), times[half], states
                prediction = torch.func.functional_call(base.unet, weights, given).sample
                loss = loss + (prediction.double() - target[half]).square().mean()
        assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        one, two = (torch.cat([each[name].flatten() for name in ours]) for each in (ours, grads(leaves)))  # type: ignore[union-attr]
        assert float((one - two).norm() / two.norm()) < 1e-5
    finally:
        live.detach()


def grads(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs of pictures: bright ones, and dark ones in the folder `negative`."""
    folder = tmp_path / "pairs"
    for number in range(3):
        picture(folder / f"{number}.png", (210, 200, 20 * number), (64, 64))
        picture(folder / "negative" / f"{number}.png", (10, 20, 20 * number), (64, 64))
    return folder


SHORT_PAIRS = {"steps": 8, "batch": 3, "lr": 5e-3, "warmup": 0, "checkpoint_every": 0}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("ia3", {}), ("tlora", {"gradient_checkpointing": True}), ("lora", {"text_encoder": True})],
)
def test_pairs_are_learned_at_opposite_strengths(
    method: str, settings: dict[str, Any], base: Base, pairs: Path, tmp_path: Path
) -> None:
    run = train(
        "picture-slider", base=base, images=pairs, output=tmp_path / "run", method=method, **SHORT_PAIRS, **settings
    )
    first, last = ([run.metrics[place][name] for name in ("positive", "negative")] for place in (0, -1))
    assert run.metrics[0]["loss"] == pytest.approx(sum(first), rel=1e-5)
    predict = Denoiser(base)
    latents = torch.zeros(1, 4, 8, 8)

    def prediction(strength: float) -> Tensor:
        with graft(base, {run.adapter_file: strength}), torch.no_grad():
            return predict(latents, torch.tensor([600]), [""])

    x0 = [base.parameterization.x0(latents, prediction(strength), torch.tensor([600])) for strength in (1.0, 0.0, -1.0)]
    assert not torch.allclose(x0[0], x0[1], atol=1e-3)
    assert float(((x0[0] - x0[1]) * (x0[1] - x0[2])).sum()) > 0
    assert len({round(value, 4) for value in (*first, *last)}) == 4


@pytest.mark.parametrize(
    ("settings", "strength"),
    [({"method": "textual-inversion", "trigger": "<sks>", "prompt": "<sks>"}, 1), ({"options.dora": True}, 2)],
)
def test_methods_without_strengths_are_refused(
    settings: dict[str, Any], strength: int, base: Base, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    given = {**SHORT_PAIRS, "loss.options.strength": strength, **settings}
    answer = "trains at the strength (-1|2), but an adapter of method=.* with these options always has strength 1"
    with pytest.raises(DiffgraftError, match=answer):
        train("picture-slider", base=base, images=pairs, output=output, **given)
    assert not output.exists()


def test_half_pairs_of_a_slider_are_refused_in_its_words(pairs: Path, tmp_path: Path) -> None:
    (pairs / "negative" / "1.png").rename(tmp_path / "1.png")
    with pytest.raises(DiffgraftError, match=r"1\.png of .* has no negative picture: put one"):
        plan_run("picture-slider", {"images": str(pairs)})
    (pairs / "negative").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DiffgraftError, match=r"has no folder negative\. Make one with a negative picture for each posi"
    ):
        plan_run("picture-slider", {"images": str(pairs)})


def test_plans_count_both_strengths(pairs: Path) -> None:
    plan = str(plan_run("picture-slider", {"images": str(pairs)}))
    assert "3, each with a negative one" in plan
    both, one = (str(plan_run("slider", {"loss.options.both": both})) for both in (True, False))
    assert both != one


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
