"""The rebuilding of the embedded base: its loop, stopped and started, and its optimiser."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffgraft.bases.tiny.train.fit import Plan, fit
from diffgraft.bases.tiny.train.muon import MuonAndAdamW
from diffgraft.bases.tiny.train.unet import timesteps

PLAN = Plan(steps=12, batch=5, lr=1e-2, decay=0.5, warmup=3, average=0.8, save_every=0)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, (1, 3)))


def loss_of(model: nn.Module, stop: int = 99) -> object:
    def loss(step: int) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(5, 3, 7, 9, generator=torch.Generator().manual_seed(step))
        total: Tensor = (model(x) - x.mean()).square().mean()
        return total

    return loss


@pytest.mark.parametrize("muon", [False, True])
def test_a_stage_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path, muon: bool) -> None:
    plan = replace(PLAN, muon=muon)
    whole = small_model()
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    fit("whole", whole, loss_of(whole), plan, tmp_path)  # type: ignore[arg-type]
    assert all(not torch.equal(before[name], p) for name, p in whole.named_parameters())

    halves = small_model()
    with pytest.raises(KeyboardInterrupt):
        fit("halves", halves, loss_of(halves, stop=7), plan, tmp_path)  # type: ignore[arg-type]
    halves = small_model()
    fit("halves", halves, loss_of(halves), plan, tmp_path)  # type: ignore[arg-type]
    for (name, one), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_muon_steps_along_the_orthogonal_part_of_the_gradient() -> None:
    """Against the singular value decomposition in float64: all singular values near one, the same subspaces."""
    layer = nn.Conv2d(5, 8, (2, 3), bias=False)
    weight = layer.weight.detach().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer = MuonAndAdamW(nn.ModuleDict({"inner": layer, "norm": nn.LayerNorm(3)}), lr=0.01)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    moved = (layer.weight.detach() - weight * (1 - 0.01 * 0.01)).flatten(1).double().numpy()
    u, _, v = np.linalg.svd(gradient.flatten(1).double().numpy(), full_matrices=False)
    wanted = -0.01 * 0.2 * np.sqrt(30) * (u @ v)
    cosine = (moved * wanted).sum() / np.linalg.norm(moved) / np.linalg.norm(wanted)
    assert cosine > 0.97
    assert abs(np.linalg.norm(moved) / np.linalg.norm(wanted) - 1) < 0.2


def test_half_of_the_timesteps_lie_where_outlines_form() -> None:
    times = timesteps(np.random.default_rng(0), 20_000)
    assert times.min() >= 0
    assert times.max() <= 999
    share = ((times >= 470) & (times < 730)).mean()
    assert abs(share - (0.5 * 0.26 + 0.5 * 0.683)) < 0.02
