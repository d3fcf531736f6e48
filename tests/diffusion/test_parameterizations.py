"""The mathematics of diffusion against float64 numpy, and against the schedulers of diffusers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.diffusion.losses import elementwise_loss, timestep_weights
from diffgraft.diffusion.parameterizations import Epsilon, Flow, Parameterization, V, parameterization
from diffgraft.diffusion.settings import Loss, Noise, Timesteps
from diffgraft.errors import DiffgraftError
from diffgraft.rng import generator

TIMES = torch.tensor([0, 10, 500, 900, 998])
SHAPE = (5, 4, 6, 7)


def schedule() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def filled(*place: int) -> Tensor:
    return torch.randn(SHAPE, generator=generator(1, *place))


def mixed(kind: Parameterization) -> tuple[np.ndarray, np.ndarray]:
    """α and σ at `TIMES` [n, 1, 1, 1], made in float64 without the code."""
    if isinstance(kind, Flow):
        even = (TIMES.numpy() + 1) / 1000
        sigma = 3 * even / (1 + 2 * even)
        alpha = 1 - sigma
    else:
        signal = schedule().double().numpy()[TIMES.numpy()]
        alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    return alpha[:, None, None, None], sigma[:, None, None, None]


KINDS = (Epsilon(schedule()), V(schedule()), Flow(1000, shift=3))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_noisy_latents_targets_and_clean_latents_are_the_formulas(kind: Parameterization) -> None:
    x, noise = filled(1), filled(2)
    alpha, sigma = mixed(kind)
    x64, noise64 = x.double().numpy(), noise.double().numpy()
    noisy = kind.noised(x, noise, TIMES)
    np.testing.assert_allclose(noisy.numpy(), alpha * x64 + sigma * noise64, atol=1e-5)
    target = kind.target(x, noise, TIMES)
    wanted = {"epsilon": noise64, "v_prediction": alpha * noise64 - sigma * x64, "flow": noise64 - x64}[kind.name]
    np.testing.assert_allclose(target.numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(kind.x0(noisy, target, TIMES).numpy(), x64, atol=2e-4)
    np.testing.assert_allclose(kind.snr(TIMES).numpy(), (alpha / sigma).flatten() ** 2, rtol=1e-3)
    np.testing.assert_allclose(kind.signal(TIMES).numpy(), alpha.flatten() ** 2, atol=1e-6)
    assert kind.noised(x.half(), noise.half(), TIMES).dtype == torch.float16


def test_they_agree_with_the_schedulers_of_diffusers() -> None:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    x, noise = filled(1), filled(2)
    for kind in (Epsilon, V):
        ddpm = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=kind.name,
            clip_sample=False,
        )
        ours = parameterization(kind.name, ddpm.alphas_cumprod)
        assert isinstance(ours, kind)
        assert torch.equal(ours.noised(x, noise, TIMES), ddpm.add_noise(x, noise, TIMES))
        if kind is V:
            assert torch.equal(ours.target(x, noise, TIMES), ddpm.get_velocity(x, noise, TIMES))
        for row, time in enumerate(TIMES.tolist()):
            guess, one = filled(3)[row : row + 1], x[row : row + 1]
            theirs = ddpm.step(guess, time, one, generator=generator(2)).pred_original_sample
            torch.testing.assert_close(ours.x0(one, guess, TIMES[row : row + 1]), theirs, rtol=1e-4, atol=1e-4)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = Flow(1000, shift=3)
    torch.testing.assert_close(flow.sigmas, euler.sigmas.flip(0)[-1000:].float(), rtol=1e-5, atol=1e-6)
    index = torch.tensor([999 - 250])
    noisy = euler.scale_noise(x[:1], euler.timesteps[250:251], noise[:1])
    torch.testing.assert_close(flow.noised(x[:1], noise[:1], index), noisy, rtol=1e-4, atol=1e-5)


def test_weights_of_timesteps_are_those_of_the_papers() -> None:
    alpha, sigma = (side.flatten() for side in mixed(KINDS[0]))
    snr = (alpha / sigma) ** 2
    least = np.minimum(snr, 5.0)
    wanted = {
        "epsilon": (least / snr, 1 / np.sqrt(np.minimum(snr, 1000))),
        "v_prediction": (least / (snr + 1), 1 / (snr + 1)),
    }
    for kind in KINDS[:2]:
        by_gamma = timestep_weights(TIMES, kind, Loss(snr_gamma=5))
        np.testing.assert_allclose(by_gamma.numpy(), wanted[kind.name][0], rtol=1e-3)
        np.testing.assert_allclose(
            timestep_weights(TIMES, kind, Loss(debiased=True)).numpy(), wanted[kind.name][1], rtol=1e-3
        )
        assert torch.equal(timestep_weights(TIMES, kind, Loss()), torch.ones(5))


@pytest.mark.parametrize(
    "settings", [Loss(snr_gamma=5), Loss(debiased=True), Loss(kind="huber", schedule="snr")], ids=str
)
def test_what_flow_matching_does_not_define_is_refused_by_name(settings: Loss) -> None:
    with pytest.raises(DiffgraftError, match=r"undefined for flow matching: .*loss\.|loss\..* undefined for flow"):
        ForwardProcess(Flow(), loss=settings)
    ForwardProcess(Flow(), loss=Loss(kind="huber", schedule="exponential"))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(DiffgraftError, match=r"prediction type 'sample': expected epsilon or v_prediction"):
        parameterization("sample", schedule())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_loss_of_a_sample_is_the_weighted_mean_of_its_squared_errors(kind: Parameterization) -> None:
    process = ForwardProcess(kind, Noise(), Timesteps(min=200, max=300), Loss())
    x = filled(4)
    noised = process.at_places(x, [(3, place) for place in range(5)])
    assert 200 <= int(noised.timesteps.min()) <= int(noised.timesteps.max()) <= 300
    prediction, weight = filled(5), filled(6)[:, :1].abs()
    squares = (prediction.double() - noised.target.double()).numpy() ** 2
    found = process.loss_per_sample(prediction, noised.target, noised.timesteps)
    np.testing.assert_allclose(found.numpy(), squares.mean((1, 2, 3)), rtol=1e-5)
    found = process.loss_per_sample(prediction, noised.target, noised.timesteps, weight)
    np.testing.assert_allclose(found.numpy(), (squares * weight.double().numpy()).mean((1, 2, 3)), rtol=1e-5)
    one = process.at_places(x[3:4], [(3, 3)])
    assert torch.equal(one.noisy[0], noised.noisy[3])  # a sample's noise does not depend on its batch


def test_the_huber_loss_is_the_formula() -> None:
    a, b = filled(7), filled(8)
    diff, kind = (a.double() - b.double()).numpy(), KINDS[0]
    alpha, sigma = mixed(kind)
    for schedule_of_delta, delta in (
        ("constant", np.full((5, 1, 1, 1), 0.2)),
        ("exponential", np.exp(np.log(0.2) * TIMES.numpy() / 1000)[:, None, None, None]),
        ("snr", 0.8 / (1 + sigma / alpha) ** 2 + 0.2),
    ):
        settings = Loss.model_validate({"kind": "huber", "delta": 0.2, "schedule": schedule_of_delta})
        found = elementwise_loss(a, b, TIMES, kind, settings)
        np.testing.assert_allclose(
            found.numpy(), 2 * delta * (np.sqrt(diff**2 + delta**2) - delta), rtol=1e-3, atol=1e-6
        )
