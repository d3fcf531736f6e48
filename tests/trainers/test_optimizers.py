"""Optimisers go downhill, go on after a checkpoint as if never stopped, and rates go as schedules say."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from diffgraft.errors import DiffgraftError
from diffgraft.trainers.hooks.checkpoint import restore, save_checkpoint
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.optim.optimizers import _FACTORIES, eval_weights, load_eval_weights, lr_at, new_optimizer
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.fingerprint import run_fingerprint
from tests.trainers.state_helpers import restored_step, state_of

RATES = {"prodigy": 1.0, "lion": 1e-2, "lion8bit": 1e-2}


def recipe_of(name: str, **more: Any) -> Recipe:
    return load_recipe("style", {"optimizer": name, "lr": RATES.get(name, 3e-2), "weight_decay": 0, **more})


IDENTITY = run_fingerprint(recipe_of("adamw"), "a base", "pictures")


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(70, 90, generator=generator)) for name in ("down", "up")}


def distance(values: dict[str, nn.Parameter]) -> torch.Tensor:
    """Of each to its own goal."""
    return torch.stack([(value - place).square().mean() for place, value in enumerate(values.values())]).sum()


def walk(recipe: Recipe, values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, *steps: int) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * lr_at(recipe, step)
        optimizer.zero_grad()
        torch.manual_seed(step)
        noises = [0.1 * torch.randn(70, 90).to(value.device) for value in values.values()]
        noisy = [
            value - place + noise for place, (value, noise) in enumerate(zip(values.values(), noises, strict=True))
        ]
        torch.stack([apart.square().sum() for apart in noisy]).sum().backward()
        optimizer.step()


def test_all_that_a_recipe_may_name_are_there() -> None:
    assert set(get_args(Recipe.model_fields["optimizer"].annotation)) == set(_FACTORIES)


@pytest.mark.parametrize("name", _FACTORIES)
def test_it_goes_downhill(name: str) -> None:
    recipe, values = recipe_of(name), parameters()
    before = float(distance(values).detach())
    optimizer = new_optimizer(recipe, values, {})
    walk(recipe, values, optimizer, *range(150))
    load_eval_weights(optimizer)
    assert float(distance(values).detach()) < 0.5 * before


@pytest.mark.parametrize("name", _FACTORIES)
def test_after_a_checkpoint_it_goes_on_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    recipe, whole = recipe_of(name), parameters()
    optimizer = new_optimizer(recipe, whole, {})
    walk(recipe, whole, optimizer, *range(5))
    save_checkpoint(tmp_path, IDENTITY, state_of(5, whole, optimizer))
    with eval_weights(optimizer):  # as when samples are drawn
        pass
    walk(recipe, whole, optimizer, *range(5, 12))
    load_eval_weights(optimizer)
    again = parameters()
    other = new_optimizer(recipe, again, {})
    assert restored_step(tmp_path, IDENTITY, state_of(0, again, other)) == 5
    walk(recipe, again, other, *range(5, 12))
    load_eval_weights(other)
    for key, value in whole.items():
        assert torch.equal(again[key], value)


def test_schedule_free_exports_its_average() -> None:
    recipe, values = recipe_of("schedule-free"), parameters()
    optimizer = new_optimizer(recipe, values, {})
    walk(recipe, values, optimizer, *range(20))
    trained = {name: value.detach().clone() for name, value in values.items()}
    with eval_weights(optimizer):
        assert not any(torch.equal(values[name], value) for name, value in trained.items())
    assert all(torch.equal(values[name], value) for name, value in trained.items())


def test_a_moving_average_is_what_is_kept_and_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    recipe, values = recipe_of("adamw", ema=0.6), parameters()
    optimizer, average = new_optimizer(recipe, values, {}), Ema(values, recipe.ema)
    wanted = {name: value.detach().double() for name, value in values.items()}
    for step in range(9):
        walk(recipe, values, optimizer, step)
        average.step()
        decay = min(0.6, (1 + step) / (10 + step)) if step else 0.0  # as diffusers lets it grow
        wanted = {name: decay * kept + (1 - decay) * values[name].detach().double() for name, kept in wanted.items()}
        if step == 4:
            save_checkpoint(tmp_path, IDENTITY, state_of(5, values, optimizer, average))
    trained = {name: value.detach().clone() for name, value in values.items()}
    with eval_weights(optimizer, average):
        for name, value in values.items():
            torch.testing.assert_close(value.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, trained[name])
    assert all(torch.equal(values[name], value) for name, value in trained.items())
    again = parameters()
    other, second = new_optimizer(recipe, again, {}), Ema(again, recipe.ema)
    assert restored_step(tmp_path, IDENTITY, state_of(0, again, other, second)) == 5
    for step in range(5, 9):
        walk(recipe, again, other, step)
        second.step()
    load_eval_weights(optimizer, average)
    load_eval_weights(other, second)
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_moments_are_those_of_their_parameters_in_whatever_groups_these_are(tmp_path: Path) -> None:
    recipe, values = recipe_of("adamw"), parameters()
    optimizer = new_optimizer(recipe, values, {"down": 4.0})
    walk(recipe, values, optimizer, *range(3))
    save_checkpoint(tmp_path, IDENTITY, state_of(3, values, optimizer))
    again = parameters()
    other = new_optimizer(recipe_of("adamw", weight_decay=0.3), again, {"up": 2.0, "down": 1.0})
    assert list(optimizer.param_groups[0]["params"]) == [values["up"]]
    assert list(other.param_groups[0]["params"]) == [again["down"]]
    assert restored_step(tmp_path, IDENTITY, state_of(0, again, other)) == 3
    for name, value in values.items():
        for key, moment in optimizer.state[value].items():
            assert torch.equal(other.state[again[name]][key], moment)
    assert [(group["rate"], group["weight_decay"]) for group in other.param_groups] == [(1.0, 0.3), (2.0, 0.3)]


def test_the_scale_of_half_precision_goes_on(tmp_path: Path) -> None:
    recipe, values = recipe_of("adamw"), parameters()
    optimizer, scaler = new_optimizer(recipe, values, {}), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for value in (torch.inf, 1.0, 1.0):  # halved by the first, and two towards being doubled
        scaler.scale((values["up"] * value).sum() + values["down"].sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    save_checkpoint(tmp_path, IDENTITY, state_of(3, values, optimizer, None, scaler))
    again, other = parameters(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    restore(tmp_path, IDENTITY, state_of(0, again, new_optimizer(recipe, again, {}), None, other))
    assert other.state_dict() == scaler.state_dict()
    assert (other.state_dict()["scale"], other.state_dict()["_growth_tracker"]) == (512.0, 2)


def test_another_optimiser_and_a_new_average_begin_where_the_parameters_are(tmp_path: Path) -> None:
    recipe, values = recipe_of("adamw"), parameters()
    optimizer = new_optimizer(recipe, values, {})
    walk(recipe, values, optimizer, *range(3))
    save_checkpoint(tmp_path, IDENTITY, state_of(3, values, optimizer))
    again, changed = parameters(), recipe_of("lion", ema=0.5)
    other, average = new_optimizer(changed, again, {}), Ema(again, changed.ema)
    identity = run_fingerprint(changed, "a base", "pictures")
    with pytest.raises(DiffgraftError, match=r"optimizer: adamw → lion; ema: 0.0 → 0.5.*--allow-changes"):
        restore(tmp_path, identity, state_of(0, again, other, average))
    assert restored_step(tmp_path, identity, state_of(0, again, other, average), allow_changes=True) == 3
    assert not other.state
    for now in (False, True):
        with eval_weights(other, average) if now else nullcontext():
            assert all(torch.equal(again[name], value) for name, value in values.items())
    walk(changed, again, other, 3)
    average.step()
    with eval_weights(other, average):
        assert not any(torch.equal(again[name], value) for name, value in values.items())


def test_what_cannot_go_together_is_told() -> None:
    with pytest.raises(DiffgraftError, match="finds one learning rate for all"):
        new_optimizer(recipe_of("prodigy"), parameters(), {"up": 4.0})
    with pytest.raises(DiffgraftError, match="averages the weights itself"):
        new_optimizer(recipe_of("schedule-free", ema=0.9), parameters(), {})
    with pytest.raises(DiffgraftError, match="cannot use lr_schedule=cosine"):
        new_optimizer(recipe_of("schedule-free", lr_schedule="cosine"), parameters(), {})


def test_the_rate_warms_up_and_goes_as_the_schedule_says() -> None:
    recipe = load_recipe("style", {"steps": 10, "warmup": 4, "lr": 0.1, "lr_schedule": "cosine"})
    assert [lr_at(recipe, step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    wanted = {
        "cosine": [0.05 * (1 + np.cos(np.pi * k / 6)) for k in range(6)],
        "linear": [0.1 * (1 - k / 6) for k in range(6)],
        "cosine_with_restarts": [0.05 * (1 + np.cos(np.pi * (k % 3) / 3)) for k in range(6)],
        "constant": [0.1] * 6,
    }
    for name, rates in wanted.items():
        changed = recipe.model_copy(update={"lr_schedule": name, "lr_cycles": 2})
        assert [lr_at(changed, step) for step in range(4, 10)] == pytest.approx(rates), name
