"""The objectives, against numpy in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.data.latents import Latents
from diffgraft.trainers.captioned import Captioned, draw_batch
from diffgraft.trainers.denoising import Denoiser, Noising, per_sample_loss
from diffgraft.trainers.dreambooth import DreamBooth
from diffgraft.trainers.examples import Examples, normal
from diffgraft.trainers.loop import rate
from diffgraft.trainers.recipe_files import load_recipe


def examples(count: int, seed: int = 0, std: float = 0.1) -> Examples:
    mean = torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(seed))
    return Examples(Latents(mean, torch.full_like(mean, std)), [f"prompt {number}" for number in range(count)])


def alphas(base: Base) -> np.ndarray:
    """ᾱ of the base's schedule, made anew from its betas: Lin et al. 2023 (arXiv:2305.08891), algorithm 1."""
    config = base.scheduler.config
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1]) if config.rescale_betas_zero_snr else root
    return root**2


def test_noising_is_the_formula(base: Base) -> None:
    noising = Noising(base)
    x, noise = torch.randn(5, 4, 6, 5), torch.randn(5, 4, 6, 5)
    times = torch.tensor([0, 10, 500, 900, 999])
    noisy, target = noising(x, noise, times)
    a = alphas(base)[times.numpy()][:, None, None, None]
    x64, e64 = x.double().numpy(), noise.double().numpy()
    np.testing.assert_allclose(noisy.numpy(), np.sqrt(a) * x64 + np.sqrt(1 - a) * e64, atol=2e-4)
    wanted = np.sqrt(a) * e64 - np.sqrt(1 - a) * x64 if base.prediction_type == "v_prediction" else e64
    np.testing.assert_allclose(target.numpy(), wanted, atol=2e-4)


def test_dreambooth_is_instance_plus_lambda_times_prior(base: Base) -> None:
    ours, kept = examples(5, 1), examples(7, 2)
    noising = Noising(base)

    def predict(noisy: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        words = torch.tensor([int(prompt[-1]) for prompt in prompts]) * 0.1
        return 0.3 * noisy + (times / 1000 + words).view(-1, 1, 1, 1)

    found = DreamBooth(ours, kept, 0.4, noising, 9).losses(predict, 21, 3)
    terms = []
    for data, kind in ((ours, 0), (kept, 1)):
        batch = draw_batch(data, noising, 9, 21, 3, kind)
        guess = predict(batch.noisy, batch.times, batch.prompts).double().numpy()
        terms.append(((guess - batch.target.double().numpy()) ** 2).mean())
    assert found["instance"].item() == pytest.approx(terms[0], rel=1e-5)
    assert found["prior"].item() == pytest.approx(terms[1], rel=1e-5)
    assert found["loss"].item() == pytest.approx(terms[0] + 0.4 * terms[1], rel=1e-5)
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)
    alone = Captioned(ours, noising, 9).losses(predict, 21, 3)
    assert alone["loss"].item() == pytest.approx(terms[0], rel=1e-5)


def test_every_example_comes_once_a_round_in_an_order_of_its_own() -> None:
    data = examples(5)
    line = data.rows(3, 0, 50)
    rounds = [line[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    assert data.rows(3, 7, 9) == line[7:16]
    assert data.rows(4, 0, 50) != line


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
            found = Denoiser(base, (64, 48), trained)(noisy, times, prompts)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_per_sample_loss_is_a_mean_over_all_but_the_first_axis() -> None:
    a, b = torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)
    wanted = ((a.double() - b.double()) ** 2).numpy().mean((1, 2, 3))
    np.testing.assert_allclose(per_sample_loss(a, b).numpy(), wanted, rtol=1e-5)


def test_the_rate_warms_up_and_falls() -> None:
    recipe = load_recipe("style", {"steps": 10, "warmup": 4, "lr": 0.1, "lr_schedule": "cosine"})
    rates = [rate(recipe, step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == pytest.approx([0.05 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])
    constant = recipe.model_copy(update={"lr_schedule": "constant"})
    assert [rate(constant, step) for step in (4, 9)] == [0.1, 0.1]
