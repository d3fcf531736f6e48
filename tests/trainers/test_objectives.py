"""The objectives, against numpy in float64."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.bases import Base, SizeConditioning
from diffgraft.data.captions import PromptBuilder
from diffgraft.data.frames import Crop
from diffgraft.data.latents import Encoded, Latents
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.errors import DiffgraftError
from diffgraft.rng import normal
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.captioned import Captioned
from diffgraft.trainers.objectives.dreambooth import DreamBooth
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import check_objective, new_objective
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.training_data.concepts import read_concepts
from diffgraft.trainers.training_data.examples import Example, Examples

CPU = torch.device("cpu")


def examples(count: int, seed: int = 0, std: float = 0.1, weight: float = 1.0) -> Examples:
    mean = torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(seed))
    latents = Latents([(one, torch.full_like(one, std)) for one in mean])
    frame = Crop((40, 48), (40, 48), (0, 0), (40, 48))
    rows = {number: range(number, number + 1) for number in range(count)}
    listed = [
        Example(f"{number}.png", rows[number], PromptBuilder((f"prompt {number}",)), weight=weight)
        for number in range(count)
    ]
    return Examples(Encoded(latents, [frame] * count, [None] * count, rows), listed)


def rows(data: Examples, seed: int, place: int, count: int) -> list[int]:
    return [one.row for at in range(place, place + count) for one in data.at(seed, at, 1)]


def alphas(base: Base) -> np.ndarray:
    """ᾱ of the base's schedule, made anew from its betas: Lin et al. 2023 (arXiv:2305.08891), algorithm 1."""
    config = base.scheduler.config
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1]) if config.rescale_betas_zero_snr else root
    return root**2


def test_noised_latents_and_targets_are_the_formula(base: Base) -> None:
    process = forward_process(base)
    x, noise = torch.randn(5, 4, 6, 5), torch.randn(5, 4, 6, 5)
    times = torch.tensor([0, 10, 500, 900, 999])
    noisy, target, _ = process.at_timesteps(x, noise, times)
    a = alphas(base)[times.numpy()][:, None, None, None]
    x64, e64 = x.double().numpy(), noise.double().numpy()
    np.testing.assert_allclose(noisy.numpy(), np.sqrt(a) * x64 + np.sqrt(1 - a) * e64, atol=2e-4)
    wanted = np.sqrt(a) * e64 - np.sqrt(1 - a) * x64 if base.prediction_type == "v_prediction" else e64
    np.testing.assert_allclose(target.numpy(), wanted, atol=2e-4)


def test_dreambooth_is_instance_plus_lambda_times_prior(base: Base) -> None:
    ours, kept = examples(5, 1), examples(7, 2, weight=0.4)
    process = forward_process(base)

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str], _: Sequence[SizeConditioning]) -> Tensor:
        words = torch.tensor([int(prompt[-1]) for prompt in prompts]) * 0.1
        return 0.3 * noisy + (times / 1000 + words).view(-1, 1, 1, 1)

    dreambooth = DreamBooth(inputs(SampleStream(ours, process, 9, CPU), SampleStream(kept, process, 9, CPU, 1)))
    found = dreambooth.losses(predict, 21, 3)
    terms = []
    for data, kind in ((ours, 0), (kept, 1)):
        batch = SampleStream(data, process, 9, CPU, kind).batch(21, 3)
        guess = predict(batch.noisy, batch.times, batch.prompts, batch.frames).double().numpy()
        terms.append(((guess - batch.target.double().numpy()) ** 2).mean())
    assert found["instance"].item() == pytest.approx(terms[0], rel=1e-5)
    assert found["prior"].item() == pytest.approx(terms[1], rel=1e-5)
    assert found["loss"].item() == pytest.approx(terms[0] + 0.4 * terms[1], rel=1e-5)
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)
    shown = dreambooth.picture_names(21, 3)
    assert shown == [f"{row}.png" for row in rows(ours, 9, 21, 3) + rows(kept, 10, 21, 3)]
    two = [SampleStream(ours, process, 9, CPU, kind).batch(21, 3) for kind in (0, 1)]
    assert not torch.equal(two[0].times, two[1].times)
    light = Captioned(inputs(SampleStream(examples(5, 1, weight=0.25), process, 9, CPU))).losses(predict, 21, 3)
    assert light["loss"].item() == pytest.approx(0.25 * terms[0], rel=1e-5)
    alone = Captioned(inputs(SampleStream(ours, process, 9, CPU))).losses(predict, 21, 3)
    assert alone["loss"].item() == pytest.approx(terms[0], rel=1e-5)


def test_every_example_comes_once_a_round_in_an_order_of_its_own() -> None:
    data = examples(5)
    line = rows(data, 3, 0, 50)
    rounds = [line[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    assert [one.row for one in data.at(3, 9, 9)] == line[9:18]
    assert rows(data, 4, 0, 50) != line


def test_noise_is_a_function_of_seed_place_and_purpose() -> None:
    first = normal((2, 3), 1, 5, 0)
    assert torch.equal(first, normal((2, 3), 1, 5, 0))
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        assert not torch.equal(first, normal((2, 3), *other))


def test_the_denoiser_says_what_the_unet_says(base: Base) -> None:
    noisy, times = torch.randn(3, 4, 16, 12), torch.tensor([3, 500, 999])
    prompts = ["a dog", "a red car at night", "a dog"]
    with torch.no_grad():
        tokens = base.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        wanted = base.unet(noisy, times, base.text_encoder(tokens)[0]).sample
        for trained in (False, True):
            found = Denoiser(base, text_is_trained=trained)(noisy, times, prompts)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def settled(base: Base, **settings: object) -> ForwardProcess:
    """A base's forward process under the settings of a recipe."""
    recipe = load_recipe("style", settings)
    return forward_process(base, recipe.objective)


def inputs(instances: SampleStream, classes: SampleStream | None = None) -> ObjectiveInputs:
    """What an objective is made of, without prior preservation by prediction."""

    def bare(*_: object) -> Tensor:
        raise AssertionError("the bare base is not asked")

    return ObjectiveInputs(instances, classes, 0.0, bare)


TIMES = torch.tensor([0, 10, 500, 900, 998])


def test_errors_are_means_over_all_but_the_first_axis(base: Base) -> None:
    a, b = torch.randn(5, 4, 6, 5), torch.randn(5, 4, 6, 5)
    wanted = ((a.double() - b.double()) ** 2).numpy().mean((1, 2, 3))
    np.testing.assert_allclose(forward_process(base).loss_per_sample(a, b, TIMES).numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_weights_of_timesteps_are_those_of_the_papers(base: Base, predicts: str) -> None:
    """And min-SNR's are made of what diffusers' scripts take for the signal-to-noise ratio."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    other = replace(base, scheduler=DDPMScheduler.from_config(base.scheduler.config, prediction_type=predicts))
    a, b = torch.randn(5, 4, 6, 5), torch.randn(5, 4, 6, 5)
    plain = ((a.double() - b.double()) ** 2).numpy().mean((1, 2, 3))
    signal = alphas(base)[TIMES.numpy()]
    snr = signal / (1 - signal)
    of_v = predicts == "v_prediction"
    np.testing.assert_allclose(compute_snr(other.scheduler, TIMES).numpy(), snr, rtol=0.02)
    least = np.minimum(snr, 5.0) / (snr + 1 if of_v else snr)
    found = settled(other, **{"loss.snr_gamma": 5}).loss_per_sample(a, b, TIMES).numpy()
    np.testing.assert_allclose(found, plain * least, rtol=0.02)
    debiased = 1 / (snr + 1) if of_v else 1 / np.sqrt(np.minimum(snr, 1000))
    found = settled(other, **{"loss.debiased": "true"}).loss_per_sample(a, b, TIMES).numpy()
    np.testing.assert_allclose(found, plain * debiased, rtol=0.02)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_the_huber_loss_is_the_formula(base: Base, schedule: str) -> None:
    a, b = torch.randn(5, 4, 6, 5), torch.randn(5, 4, 6, 5)
    sigma = np.sqrt(1 / alphas(base)[TIMES.numpy()] - 1)
    delta = {
        "constant": np.full(5, 0.2),
        "exponential": np.exp(np.log(0.2) * TIMES.numpy() / 1000),
        "snr": 0.8 / (1 + sigma) ** 2 + 0.2,
    }[schedule][:, None, None, None]
    apart = (a - b).double().numpy()
    wanted = (2 * delta * (np.sqrt(apart**2 + delta**2) - delta)).mean((1, 2, 3))
    process = settled(base, **{"loss.kind": "huber", "loss.delta": 0.2, "loss.schedule": schedule})
    np.testing.assert_allclose(process.loss_per_sample(a, b, TIMES).numpy(), wanted, rtol=2e-3)


def test_noise_of_the_ways_of_the_field(base: Base) -> None:
    x, places = torch.randn(400, 4, 6, 5), range(400)
    zero = torch.zeros_like(x)

    def laid(**settings: object) -> tuple[Tensor, Tensor]:
        """The noise that is to be found, and the noise in the input."""
        process = settled(base, **{"timesteps.min": 600, "timesteps.max": 600, **settings})
        noisy, target, times = process.at_places(zero, [(3, place, 0) for place in places])
        assert set(times.tolist()) == {600}
        a = float(alphas(base)[600])
        return target / (np.sqrt(a) if base.prediction_type == "v_prediction" else 1), noisy / np.sqrt(1 - a)

    plain, same = laid()
    torch.testing.assert_close(plain, same, rtol=1e-3, atol=1e-3)
    found, _ = laid(**{"noise.offset": 0.5})
    added = found - plain
    torch.testing.assert_close(added, added.mean((2, 3), keepdim=True).expand_as(added), rtol=1e-3, atol=1e-3)
    assert float(added[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.08)
    rough, _ = laid(**{"noise.pyramid": 0.8})
    torch.testing.assert_close(rough.flatten(1).std(1), torch.ones(400), rtol=1e-2, atol=1e-2)
    assert float(rough.mean((2, 3)).std()) > 2 * float(plain.mean((2, 3)).std())
    wanted, given = laid(**{"noise.perturbation": 0.3})
    torch.testing.assert_close(wanted, plain, rtol=1e-3, atol=1e-3)
    assert float((given - wanted).std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float(((given - wanted) * wanted).mean())) < 0.01


def test_timesteps_lie_in_their_range_and_follow_their_spread(base: Base) -> None:
    x = torch.zeros(4000, 1, 1, 1)
    for settings, low, high in (
        ({}, 0, 999),
        ({"timesteps.min": 200, "timesteps.max": 300}, 200, 300),
        ({"timesteps.distribution": "logit-normal", "timesteps.mean": 1, "timesteps.std": 0.5}, 250, 1000),
    ):
        *_, times = settled(base, **settings).at_places(x, [(5, place, 0) for place in range(4000)])
        assert low <= int(times.min()) <= low + 120
        assert high - 120 <= int(times.max()) <= high
        if "timesteps.mean" in settings:
            logits = torch.logit((times + 0.5) / 1000)
            assert float(logits.mean()) == pytest.approx(1, abs=0.03)
            assert float(logits.std()) == pytest.approx(0.5, abs=0.02)
    for broken in ({"timesteps.max": 1000}, {"timesteps.min": 30, "timesteps.max": 20}):
        with pytest.raises(DiffgraftError, match="between 0 and 999"):
            settled(base, **broken)


def test_consistency_is_its_formula(base: Base) -> None:
    """Luo et al. 2023: both ends of a guided step of DDIM, with a denoiser that is known in numpy."""
    process, data = forward_process(base), examples(5, 1, weight=0.5)

    def predicted(noisy: Any, times: Any, words: Any, factor: float) -> Any:
        return factor * noisy + times / 1000 + 0.1 * words

    def predict_by(factor: float) -> Any:
        def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str], frames: Sequence[SizeConditioning]) -> Tensor:
            assert len(prompts) == len(frames) == len(noisy)
            words = torch.tensor([float(prompt[-1]) if prompt else 0.0 for prompt in prompts])
            return predicted(noisy, times.view(-1, 1, 1, 1), words.view(-1, 1, 1, 1), factor)

        return predict

    stream = SampleStream(data, process, 9, CPU)
    given = ObjectiveInputs(stream, None, 0.0, predict_by(0.2))
    found = new_objective("consistency", given, {"guidance": 4.0, "step": 30}).losses(predict_by(0.3), 21, 3)["loss"]
    batch = stream.batch(21, 3)
    a = alphas(base)
    x = batch.noisy.double().numpy()
    t = batch.times.numpy()
    s = np.maximum(t - 30, 0)
    words = np.array([float(prompt[-1]) for prompt in batch.prompts])[:, None, None, None]

    def at(times: Any) -> Any:
        return times[:, None, None, None]

    def x0(noisy: Any, times: Any, prediction: Any) -> Any:  # of v
        return np.sqrt(at(a[times])) * noisy - np.sqrt(1 - at(a[times])) * prediction

    def f(noisy: Any, times: Any) -> Any:
        scaled = 10.0 * at(times)
        clean = x0(noisy, times, predicted(noisy, at(times), words, 0.3))
        return 0.25 / (scaled**2 + 0.25) * noisy + scaled / np.sqrt(scaled**2 + 0.25) * clean

    own, empty = (x0(x, t, predicted(x, at(t), w, 0.2)) for w in (words, 0 * words))
    clean = empty + 4.0 * (own - empty)
    noise = (x - np.sqrt(at(a[t])) * clean) / np.sqrt(1 - at(a[t]))
    stepped = np.sqrt(at(a[s])) * clean + np.sqrt(1 - at(a[s])) * noise
    wanted = 0.5 * (np.sqrt((f(x, t) - f(stepped, s)) ** 2 + 1e-6) - 1e-3).mean()
    assert base.prediction_type == "v_prediction"
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_consistency_teaches_the_student_at_the_noisier_end_alone(base: Base) -> None:
    factor = torch.tensor(0.3, requires_grad=True)
    asked: list[bool] = []

    def predict(noisy: Tensor, *_: object) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return factor * noisy

    given = ObjectiveInputs(SampleStream(examples(5), forward_process(base), 9, CPU), None, 0.0, predict)
    new_objective("consistency", given).losses(predict, 0, 3)["loss"].backward()
    assert asked == [False, False, True]
    assert factor.grad is not None


def test_options_of_objectives_are_checked() -> None:
    for name, options, answer in (
        ("consistency", {"gidance": 3}, "has no option 'gidance': did you mean 'guidance'"),
        ("consistency", {"guidance": 0}, "Invalid value loss.options.guidance=0"),
        ("captioned", {"guidance": 3}, "it has no options"),
        ("", {"guidance": 3}, "set loss.objective as well"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            check_objective(name, options)
    recipe = load_recipe("style", {"loss.objective": "consistency", "loss.options.guidance": "3"})
    check_objective(recipe.loss.objective, recipe.loss.options)


def test_without_use_for_a_prior_no_class_image_is_drawn(pictures: Path) -> None:
    plain = {"images": str(pictures), "prior.weight": 1}
    for settings, count in ((plain, 1), ({**plain, "loss.objective": "consistency"}, 0)):
        _, concepts = read_concepts(load_recipe("style", settings))
        assert [concept.prior_preservation is not None for concept, _ in concepts].count(True) == count
