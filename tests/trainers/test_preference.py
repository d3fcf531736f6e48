"""Training on pairs: the loss of diffusers' script for Diffusion-DPO, and the folders that pairs are read from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.parity import Draws
from diffgraft.adapters.method import Spec
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import new_objective
from diffgraft.trainers.planning.plan import plan_run
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.train import train
from diffgraft.trainers.training_data.build import TrainingData, build_training_data
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.examples import Examples
from tests.trainers.test_objectives import CPU, examples

BETA = 7.0
"""It multiplies the rounding of errors in float32, which is why it is small here"""


def losing(winning: Examples) -> Examples:
    """Other latents in the place of those of `winning`."""
    other = examples(len(winning.examples), seed=8, std=0.2)
    return replace(winning, encoded=replace(winning.encoded, latents=other.encoded.latents))


def streams(base: Base, weight: float = 1.0) -> tuple[SampleStream, SampleStream]:
    winning = examples(5, seed=1, weight=weight)
    process = forward_process(base)
    return SampleStream(winning, process, 9, CPU), SampleStream(losing(winning), process, 9, CPU)


def of_type(base: Base, predicts: str) -> Base:
    return replace(base, scheduler=DDPMScheduler.from_config(base.scheduler.config, prediction_type=predicts))


def drawn(base: Base, winner: SampleStream, loser: SampleStream, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents and targets [2n, c, h, w] and timesteps [2n], by diffusers' scheduler, in float64."""
    latents = []
    for stream, rows, spread in zip((winner, loser), draws.rows, draws.spread, strict=True):
        own = stream.examples.encoded.latents
        latents.append(torch.stack([own[row][0] + own[row][1] * one for row, one in zip(rows, spread, strict=True)]))
    x, noise, times = torch.cat(latents).double(), draws.noise[0].double().repeat(2, 1, 1, 1), draws.times[0].repeat(2)
    noisy = base.scheduler.add_noise(x, noise, times)
    is_epsilon = base.scheduler.config.prediction_type == "epsilon"
    return noisy, noise if is_epsilon else base.scheduler.get_velocity(x, noise, times), times


def script(own: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy as ``train_diffusion_dpo.py`` of diffusers computes them from predictions [2n, c, h, w]."""
    diffs = []
    for prediction in (own, reference):
        preferred, rejected = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3)).chunk(2)
        diffs.append(preferred - rejected)
    logits = diffs[1] - diffs[0]
    return -F.logsigmoid(BETA * logits).mean(), ((logits > 0).double() + 0.5 * (logits == 0).double()).mean()


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found.double() - wanted.double()).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_loss_and_gradients_are_those_of_the_script_in_float64(base: Base, predicts: str) -> None:
    base = of_type(base, predicts)
    winner, loser = streams(base)
    found = torch.tensor([0.3, 0.2], requires_grad=True)
    wanted = found.detach().double().requires_grad_()

    def predicted(factors: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        return factors[0] * noisy + factors[1] * (noisy.roll(1, -1) + times.view(-1, 1, 1, 1) / 1000)

    def predict(noisy: Tensor, times: Tensor, *_: object) -> Tensor:
        return predicted(found, noisy, times)

    def bare(noisy: Tensor, times: Tensor, *_: object) -> Tensor:
        return predicted(torch.tensor([0.28, 0.21]), noisy, times)

    objective = new_objective("preference", ObjectiveInputs(winner, None, 0.0, bare, loser), {"beta": BETA})
    draws = Draws()
    with draws.watch():
        terms = objective.losses(predict, 20, 4)
    assert torch.equal(draws.noise[0], draws.noise[1])
    assert torch.equal(draws.times[0], draws.times[1])
    assert draws.rows[0] == draws.rows[1]
    noisy, target, times = drawn(base, winner, loser, draws)
    reference = predicted(torch.tensor([0.28, 0.21]).double(), noisy, times)
    loss, accuracy = script(predicted(wanted, noisy, times), reference, target)
    terms["loss"].backward()
    loss.backward()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms["accuracy"].item() == accuracy.item()
    assert found.grad is not None
    assert wanted.grad is not None
    assert close(found.grad, wanted.grad)
    errors = (predicted(wanted, noisy, times) - target).square().mean((1, 2, 3))
    assert terms["preferred"].item() == pytest.approx(errors[:4].mean().item(), rel=1e-5)
    assert terms["rejected"].item() == pytest.approx(errors[4:].mean().item(), rel=1e-5)
    assert objective.picture_names(20, 4) == winner.picture_names(20, 4)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_first_gradients_of_a_lora_are_those_of_the_script(base: Base, predicts: str) -> None:
    other = of_type(base, predicts)
    winner, loser = streams(other)
    paths = choose_layers("unet", base.unet, "attention")
    live = get_method("lora").attach(base, Spec({"unet": paths}, 3, 3.0, 5, get_method("lora").read_options({})))
    try:
        denoiser = Denoiser(other, live)

        def bare(*asked: Any) -> Tensor:
            with live.disabled():
                prediction: Tensor = denoiser(*asked)
            return prediction

        objective = new_objective("preference", ObjectiveInputs(winner, None, 0.0, bare, loser), {"beta": BETA})
        draws = Draws()
        with draws.watch():
            terms = objective.losses(denoiser, 20, 4)
        assert terms["loss"].item() == pytest.approx(np.log(2), rel=1e-6)  # the adapter does nothing yet
        assert terms["accuracy"].item() == 0.5
        terms["loss"].backward()
        ours = {name: value.grad for name, value in live.trainable().items()}
        for value in live.trainable().values():
            value.grad = None
        noisy, target, times = drawn(other, winner, loser, draws)
        tokens = base.tokenizer(draws.prompts[:4], padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = base.text_encoder(tokens)[0].repeat(2, 1, 1)
        own = base.unet(noisy.float(), times, states).sample
        loss, _ = script(own.double(), own.detach().double(), target)
        loss.backward()
        moved = [name for name, value in live.trainable().items() if value.grad is not None and value.grad.any()]
        assert len(moved) > 10
        theirs = {name: live.trainable()[name].grad for name in moved}
        assert close(*(torch.cat([each[name].flatten() for name in moved]) for each in (ours, theirs)))  # type: ignore[union-attr]
    finally:
        live.detach()


def test_masks_and_weights_count(base: Base) -> None:
    def predict(noisy: Tensor, *_: object) -> Tensor:
        return 0.3 * noisy

    def bare(noisy: Tensor, *_: object) -> Tensor:
        return 0.2 * noisy

    def loss(weight: float, mask: float) -> float:
        winner, loser = streams(base, weight)
        masks = [torch.full((6, 5), mask)] * 5
        winner = replace(
            winner, examples=replace(winner.examples, encoded=replace(winner.examples.encoded, masks=masks))
        )
        given = ObjectiveInputs(winner, None, 0.0, bare, loser)
        return new_objective("preference", given, {"beta": 3}).losses(predict, 0, 3)["loss"].item()

    assert loss(0.5, 1.0) == pytest.approx(loss(1.0, 1.0) / 2)
    assert loss(1.0, 0.0) == pytest.approx(np.log(2))
    assert loss(1.0, 1.0) != pytest.approx(np.log(2), rel=1e-3)


def test_without_pairs_there_is_no_such_objective(base: Base) -> None:
    stream, _ = streams(base)
    with pytest.raises(DiffgraftError, match="needs pairs"):
        new_objective("preference", ObjectiveInputs(stream, None, 0.0, lambda *_: torch.zeros(1)))


def picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(colour)).integers(0, 40, (size[1], size[0], 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(file)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs of oblong pictures, with captions."""
    folder = tmp_path / "pairs"
    for number in range(3):
        picture(folder / f"{number}.png", (200, 10 * number, 20))
        picture(folder / "rejected" / f"{number}.png", (20, 10 * number, 200))
        (folder / f"{number}.txt").write_text(f"a dog {number}")
    return folder


SETTINGS = {"loss.objective": "preference", "prior.weight": 0, "trigger": "", "caption": "{caption}"}


def gathered(base: Base, folder: Path, **settings: Any) -> TrainingData:
    recipe = load_recipe("style", {**SETTINGS, "images": str(folder), "buckets.use": True, **settings})
    recipe, concepts = read_concepts(recipe)
    return build_training_data(recipe.data, recipe.validation, recipe.seed, base, concepts)


def test_pairs_are_cropped_alike(base: Base, pairs: Path) -> None:
    data = gathered(base, pairs, crop="random", crop_scale=0.7, flip=True)
    assert data.partners is not None
    ours, theirs = data.instances.encoded, data.partners.encoded
    assert ours.frames == theirs.frames
    assert ours.rows == theirs.rows
    assert not torch.equal(ours.latents[0][0], theirs.latents[0][0])
    assert [one.name for one in data.partners.examples] == [f"rejected/{number}.png" for number in range(3)]
    assert data.prompts == [f"a dog {number}" for number in range(3)]
    for at in range(12):
        (variant,), (other,) = data.instances.at(4, at, 1), data.partners.at(4, at, 1)
        assert (variant.row, variant.text) == (other.row, other.text)


def test_another_rejected_picture_is_another_run(base: Base, pairs: Path) -> None:
    before = gathered(base, pairs).digest
    picture(pairs / "rejected" / "1.png", (1, 200, 3))
    assert gathered(base, pairs).digest != before


def test_numbered_folders_have_pairs_of_their_own(base: Base, pairs: Path, tmp_path: Path) -> None:
    pairs.rename(tmp_path / "2_a dog")
    data = gathered(base, tmp_path)
    assert data.partners is not None
    assert [one.repeats for one in data.partners.examples] == [2, 2, 2]


def test_half_pairs_are_refused(base: Base, pairs: Path, tmp_path: Path) -> None:
    (pairs / "rejected" / "1.png").rename(tmp_path / "1.png")
    with pytest.raises(DiffgraftError, match=r"1\.png of .* has no rejected picture: put one of the same name into"):
        gathered(base, pairs)
    (tmp_path / "1.png").rename(pairs / "rejected" / "1.png")
    picture(pairs / "rejected" / "7.png", (9, 9, 9))
    with pytest.raises(DiffgraftError, match=r"7\.png of .* has no preferred picture"):
        gathered(base, pairs)
    (pairs / "rejected" / "7.png").unlink()
    picture(pairs / "rejected" / "1.png", (9, 9, 9), (32, 48))
    with pytest.raises(DiffgraftError, match=r"1\.png is 48x32, but rejected/1\.png is 32x48: .* need the same size"):
        gathered(base, pairs)
    (pairs / "rejected").rename(tmp_path / "elsewhere")
    with pytest.raises(DiffgraftError, match=r"There are no pairs in .*: it has no folder rejected"):
        gathered(base, pairs)
    (pairs / "rejected").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiffgraftError, match="is a file outside of"):
        gathered(base, pairs)


def test_a_half_that_cannot_be_opened_is_refused(base: Base, pairs: Path) -> None:
    file = pairs / "rejected" / "1.png"
    file.write_bytes(file.read_bytes()[:200])  # the header is whole
    with (
        pytest.warns(UserWarning, match=r"rejected/1\.png is left out"),
        pytest.raises(DiffgraftError, match="An image of a pair cannot be opened, while the other can"),
    ):
        gathered(base, pairs)


def test_other_objectives_leave_the_folder_alone(base: Base, pairs: Path) -> None:
    with pytest.warns(UserWarning, match="3 pictures in subfolders of .* are not used"):
        data = gathered(base, pairs, **{"loss.objective": "captioned"})
    assert data.partners is None


METHODS: Sequence[tuple[str, dict[str, Any]]] = (
    ("lora", {}),
    ("oft", {}),
    ("hypernetwork", {}),
    ("textual-inversion", {"trigger": "<sks>", "caption": "{caption} {trigger}"}),
)


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_every_method_learns_which_are_preferred(
    method: str, settings: dict[str, Any], base: Base, pairs: Path, tmp_path: Path
) -> None:
    run = train(
        "preferences",
        base=base,
        images=pairs,
        output=tmp_path / "run",
        method=method,
        **{"batch": 3, "steps": 8, "lr": 1e-3, "warmup": 0, "checkpoint_every": 0, **settings},
    )
    assert np.mean([entry["accuracy"] for entry in run.metrics[3:]]) > 0.5
    assert np.mean([entry["loss"] for entry in run.metrics[3:]]) < np.log(2)


def test_a_plan_counts_both_pictures_and_the_reference(pairs: Path) -> None:
    def step(objective: str) -> str:
        settings = {**SETTINGS, "images": str(pairs), "loss.objective": objective}
        return str(plan_run("style", settings))

    paired, alone = step("preference"), step("captioned")
    assert "3, each with a rejected one" in paired
    assert "not used" not in paired
    assert paired != alone
