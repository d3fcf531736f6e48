"""Distributions of training timesteps, held to their distribution functions."""

import math
from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffgraft.bases import Base
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.diffusion.noise import draw_timestep
from diffgraft.diffusion.parameterizations import Flow
from diffgraft.diffusion.settings import Timesteps
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import forward_process
from diffgraft.trainers.recipe.files import load_recipe
from tests.recipes import SUBJECT

DRAWN, SCHEDULE = 4000, 800


def unshifted(share: float, shift: float) -> float:
    """The share that a shift moves to `share`: the inverse of s·u / (1 + (s − 1)·u)."""
    return share / (shift - (shift - 1) * share)


def logit_normal(share: float, mean: float, std: float) -> float:
    return NormalDist(mean, std).cdf(math.log(share / (1 - share)))


@pytest.mark.parametrize(
    ("settings", "below"),
    [
        ({}, lambda share: share),
        ({"shift": 3.0}, lambda share: unshifted(share, 3.0)),
        ({"shift": 0.4}, lambda share: unshifted(share, 0.4)),
        (
            {"distribution": "logit-normal", "mean": 0.3, "std": 0.8, "shift": 2.2},
            lambda share: logit_normal(unshifted(share, 2.2), 0.3, 0.8),
        ),
        ({"distribution": "logit-normal"}, lambda share: logit_normal(share, 0.0, 1.0)),
    ],
    ids=["uniform", "shifted up", "shifted down", "logit-normal and shifted", "logit-normal"],
)
def test_shares_are_distributed_as_they_should_be(settings: dict[str, Any], below: Callable[[float], float]) -> None:
    """The largest distance to the distribution function is one of 4000 draws by chance (Kolmogorov and Smirnov)."""
    rule = Timesteps.model_validate(settings)
    shift = float(rule.shift)
    drawn = np.array([draw_timestep(SCHEDULE, rule, (5, place), shift) for place in range(DRAWN)])
    assert drawn.min() >= 0
    assert drawn.max() < SCHEDULE
    edges = np.arange(40, SCHEDULE, 40)
    found = np.array([(drawn < edge).mean() for edge in edges])
    wanted = np.array([below(edge / SCHEDULE) for edge in edges])
    assert np.abs(found - wanted).max() < 1.63 / DRAWN**0.5


def patch_of(flow_base: Base) -> int:
    """Latents on a side of a token; Qwen-Image 2.1 has one for each latent, although its sizes are multiples of two."""
    return 1 if flow_base.family.name == "qwen-image-21" else int(flow_base.family.patch)


def test_shift_by_size_is_the_familys(flow_base: Base) -> None:
    """A line in the number of patches through the two points of the scheduler's configuration, to the power of e."""
    config, patch = flow_base.scheduler.config, patch_of(flow_base)
    for height, width in ((8, 12), (64, 48), (128, 128)):
        tokens = height * width // patch**2
        ends = (config.base_image_seq_len, config.max_image_seq_len), (config.base_shift, config.max_shift)
        (low, high), (first, last) = ends
        wanted = math.exp(first + (last - first) * (tokens - low) / (high - low))
        assert flow_base.family.timestep_shift(flow_base, height, width) == pytest.approx(wanted)
    recipe = load_recipe(SUBJECT, {"subject": "dog", "timesteps.shift": "size"})
    size, seeds = (flow_base.latents.channels, 16, 8), [(3, place) for place in range(500)]
    found = forward_process(flow_base, recipe.objective).at_places(torch.zeros(500, *size), seeds).timesteps
    shift = flow_base.family.timestep_shift(flow_base, 16, 8)
    rule = Timesteps.model_validate({"shift": shift})
    assert found.tolist() == [draw_timestep(1000, rule, seed, shift) for seed in seeds]


def test_a_scheduler_without_shifts_has_those_of_flux(flow_base: Base) -> None:
    config = {**flow_base.scheduler.config, "base_shift": None, "max_shift": None, "max_image_seq_len": None}
    shift = math.exp(0.5 + 0.65 * (1024 - 256) / (4096 - 256))
    patch = patch_of(flow_base)
    other: Any = SimpleNamespace(scheduler=flow_base.scheduler.from_config(config))
    assert flow_base.family.timestep_shift(other, 32 * patch, 32 * patch) == pytest.approx(shift)


def test_a_shift_by_size_needs_a_family_that_has_one(base: Base) -> None:
    recipe = load_recipe(SUBJECT, {"subject": "dog", "timesteps.shift": "size"})
    with pytest.raises(DiffgraftError, match=r"timesteps\.shift=size has no meaning for this base"):
        forward_process(base, recipe.objective)
    with pytest.raises(DiffgraftError, match=r"timesteps\.shift=size has no meaning"):
        ForwardProcess(Flow(), timesteps=Timesteps.model_validate({"shift": "size"}))


@pytest.mark.parametrize(("text", "value"), [("2.5", 2.5), ("3", 3.0), ("size", "size")])
def test_a_shift_is_read_from_the_command_line(text: str, value: object) -> None:
    recipe = load_recipe(SUBJECT, {"subject": "dog", "timesteps.shift": text})
    assert recipe.objective.timesteps.shift == value


@pytest.mark.parametrize("text", ["0", "-1", "large", "nan"])
def test_a_shift_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DiffgraftError, match=r"Invalid value timesteps\.shift='.*': must be 'size' or "):
        load_recipe(SUBJECT, {"subject": "dog", "timesteps.shift": text})


@pytest.mark.parametrize("name", ["zimage-subject", "zimage-style"])
def test_the_recipes_of_zimage_undo_the_shift_of_its_schedule(name: str) -> None:
    """Half of σ = s · u / (1 + (s − 1) · u) lie above s / (1 + s), where u is the sigmoid of a normal number: s = 2."""
    timesteps = load_recipe(name, {"subject": "dog"} if name.endswith("subject") else {}).timesteps
    schedule = Flow(1000, 6.0).sigmas
    shift = float(timesteps.shift)
    drawn = [float(schedule[draw_timestep(1000, timesteps, (3, index), shift)]) for index in range(2000)]
    assert np.median(drawn) == pytest.approx(2 / 3, abs=0.02)
