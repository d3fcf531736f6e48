"""Samplers and schedules held to trajectories of k-diffusion and webui, on a fixed denoiser and fixed noise.

``k_diffusion.safetensors`` was made by k-diffusion of February 2026, and by ``sd_schedulers.py`` and
``sd_samplers_extra.py`` of webui Forge, with `Toy` below, in float64.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffgraft.errors import DiffgraftError
from diffgraft.generation.samplers import by_diffusers, k_diffusion
from diffgraft.generation.samplers.schedules import SCHEDULES, NoiseLevels, schedule_sigmas

KNOWN = load_file(Path(__file__).with_name("k_diffusion.safetensors"))
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SIGNAL = np.cumprod(1 - BETAS)
LEVELS = NoiseLevels(np.sqrt((1 - SIGNAL) / SIGNAL))
"""Noise levels of Stable Diffusion 1.5"""
START = torch.linspace(-1.5, 1.2, 6, dtype=torch.float64).view(2, 3)


class Toy:
    """A denoiser of two latents of three values, and noise that is a function of the number of the call."""

    def __init__(self) -> None:
        self.calls = 0

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        return x * 0.7 / (0.49 + sigma**2) + 0.3 * torch.sin(x / (1 + sigma)) + 0.1

    def noise(self, before: float, after: float) -> Tensor:
        assert before != after
        self.calls += 1
        return torch.cos(torch.arange(6, dtype=torch.float64).view(2, 3) * 1.7 + self.calls * 2.3) * 1.4


def run(name: str, sigmas: Sequence[float]) -> Iterator[Tensor]:
    toy = Toy()
    sampler: k_diffusion.Sampler = getattr(k_diffusion, name)
    return sampler(toy.denoise, START * sigmas[0], sigmas, toy.noise)


@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in KNOWN if key.startswith("sampler/")}))
def test_trajectories(name: str) -> None:
    schedules = [key.split("/")[2] for key in KNOWN if key.startswith(f"sampler/{name}/")]
    assert len(schedules) == 6
    for schedule in schedules:
        found = torch.stack([*run(name, schedule_sigmas(schedule, 9, LEVELS))])
        wanted = KNOWN[f"sampler/{name}/{schedule}"].double()
        assert found.shape == wanted.shape == (9, 2, 3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [15, 20, 36])
def test_restarts(steps: int) -> None:
    taken = [*run("restart", schedule_sigmas("karras", steps, LEVELS))]
    assert len(taken) == steps
    torch.testing.assert_close(taken[-1], KNOWN[f"restart/{steps}"].double(), rtol=1e-5, atol=1e-5)


def test_a_consistency_model_predicts_and_adds_noise() -> None:
    sigmas, toy = [10.0, 2.0, 0.0], Toy()
    first = toy.denoise(START * 10, 10) + toy.noise(10, 2) * 2
    wanted = [first, toy.denoise(first, 2)]
    found = [*k_diffusion.lcm(toy.denoise, START * 10, sigmas, Toy().noise)]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))


def test_schedules() -> None:
    held = {key.split("/")[1] for key in KNOWN if key.startswith("schedule/")}
    assert set(SCHEDULES) - held == {"turbo"}
    for key, wanted in KNOWN.items():
        if key.startswith("schedule/"):
            _, name, steps = key.split("/")
            levels = NoiseLevels(LEVELS.sigmas, is_xl=True) if steps == "xl" else LEVELS
            found = schedule_sigmas(name, 7 if steps == "xl" else int(steps), levels)
            assert found == pytest.approx(wanted.tolist(), rel=2e-5, abs=1e-5), key


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_schedules_of_any_length_fall_to_their_end(name: str, steps: int) -> None:
    sigmas = schedule_sigmas(name, steps, LEVELS)
    assert all(np.isfinite(sigmas))
    assert all(before >= after for before, after in pairwise(sigmas))
    assert sigmas[-1] == pytest.approx(0 if name != "kl optimal" else LEVELS.smallest)


def test_turbo_takes_the_ends_of_equal_parts() -> None:
    found = schedule_sigmas("turbo", 4, LEVELS)
    assert found == [*(float(LEVELS.sigmas[time]) for time in (999, 749, 499, 249)), 0.0]


def test_timesteps_and_noise_levels_are_inverse() -> None:
    for time in (0.0, 12.5, 998.25, 999.0):
        assert LEVELS.timestep(LEVELS.sigma(time)) == pytest.approx(time, abs=1e-9)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(DiffgraftError, match=r"Invalid value schedule='karas': did you mean 'karras'"):
        schedule_sigmas("karas", 3, LEVELS)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_samplers_that_k_diffusion_has_not_are_those_of_diffusers() -> None:
    """PLMS, DEIS and UniPC on diffusers' own timesteps, each step in its convention x / √(1 + σ²)."""
    from diffusers import DEISMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kinds: dict[str, tuple[Any, Any]] = {
        "plms": (PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1), k_diffusion.plms),
        "deis": (DEISMultistepScheduler(**betas, solver_order=3, lower_order_final=False), k_diffusion.deis),
        "unipc": (UniPCMultistepScheduler(**betas, solver_order=3, solver_type="bh1"), by_diffusers.unipc),
    }
    for name, (scheduler, sampler) in kinds.items():
        scheduler.set_timesteps(9)
        times = list(dict.fromkeys(scheduler.timesteps.tolist()))  # PNDM takes the second timestep twice
        sigmas = [float(LEVELS.sigmas[int(time)]) for time in times]
        toy = Toy()
        x = START.view(1, 2, 3, 1) * sigmas[0]
        end = [0.0] if name == "unipc" else []  # its last steps are of lower order
        found = [step.flatten() for step in sampler(toy.denoise, x, [*sigmas, *end], toy.noise)][: len(times) - 1]
        latents, wanted = x / (1 + sigmas[0] ** 2) ** 0.5, []
        for time in scheduler.timesteps[: len(times) if name == "plms" else len(times) - 1]:
            sigma = float(LEVELS.sigmas[int(time)])
            if name == "plms" and len(wanted) == 1 and time == scheduler.timesteps[1]:
                sigma = sigmas[1]
            k = latents * (1 + sigma**2) ** 0.5
            latents = scheduler.step((k - toy.denoise(k, sigma)) / sigma, time, latents).prev_sample
            wanted.append(latents)
        if name == "plms":
            wanted = wanted[1:]  # its first step takes two evaluations
        for place, (own, theirs) in enumerate(zip(found, wanted, strict=True)):
            scaled = theirs.flatten() * (1 + sigmas[place + 1] ** 2) ** 0.5
            torch.testing.assert_close(own, scaled.to(own), rtol=2e-4, atol=2e-4, msg=f"{name} {place}")
