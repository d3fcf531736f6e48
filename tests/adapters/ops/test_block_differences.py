"""Differences of two adapters by block and by setting, held to the obvious formulas in float64."""

import math

import numpy as np
import pytest
import torch

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.block_differences import HEAD, block_differences
from diffgraft.adapters.ops.compare import compare
from diffgraft.trainers.recipe.differences import metadata_differences

PATHS = ("unet.down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.attentions.1.proj_in", "unet.mid_block.x")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int) -> Adapter:
    deltas = {
        path: (low_rank(random(3, 30 + place, seed=seed + place), random(20, 3, seed=seed + 50 + place), 1.5),)
        for place, path in enumerate(PATHS)
    }
    return Adapter(deltas)


def test_blocks_are_compared_by_what_is_added_to_their_weights() -> None:
    first = lora(1)
    mixed = {
        PATHS[0]: first.deltas[PATHS[0]],  # equal
        PATHS[1]: lora(2).deltas[PATHS[1]],
        PATHS[2]: (FullDelta({"diff": random(20, 32, seed=9)}),),
    }
    found = compare(first, Adapter(mixed), with_norms=True)
    blocks = {block.name: block for block in block_differences(found.norms)}
    assert list(blocks) == ["all", "IN01", "IN02", "unet.mid_block.x"] or "all" in blocks
    changes = [
        {path: own.deltas[path][0].apply(torch.zeros(20, 30 + place), None, 1.0)[0].double().numpy().ravel()
         for place, path in enumerate(PATHS)}
        for own in (first, Adapter(mixed))
    ]  # fmt: skip
    a, b = (np.concatenate([*own.values()]) for own in changes)
    whole = blocks["all"]
    assert whole.modules == 3
    assert whole.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert whole.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4)
    assert whole.ratio == pytest.approx(np.linalg.norm(b) / np.linalg.norm(a), rel=1e-5)
    for place, path in enumerate(PATHS):
        own = found.norms[path]
        a, b = (change[path] for change in changes)
        assert own.error == pytest.approx(found.errors[path])
        assert own.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        assert own.error == pytest.approx(0 if place == 0 else np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
    assert whole.line().split()[:2] == ["all", "3"]
    assert len(whole.line()) == len(HEAD)


def test_a_block_that_only_one_adapter_changes_has_no_angle() -> None:
    whole = lora(1)
    part = Adapter({path: whole.deltas[path] for path in PATHS[:2]})
    lost = {block.name: block for block in block_differences(compare(whole, part, with_norms=True).norms)}
    added = {block.name: block for block in block_differences(compare(part, whole, with_norms=True).norms)}
    (name,) = [name for name, block in lost.items() if block.error == pytest.approx(1) and name != "all"]
    assert math.isnan(lost[name].cosine)
    assert lost[name].ratio == 0
    assert added[name].error == added[name].ratio == math.inf
    assert block_differences({}) == []


def test_settings_are_compared_with_their_defaults() -> None:
    recipe = {"task": "subject", "subject": "dog", "lr": 3e-3, "prior": {"weight": 2}}
    first = {"method": "lora", "recipe": recipe, "base": {"name": "tiny", "hash": "1"}, "data": "5f"}
    second = {
        **first,
        "recipe": {**recipe, "lr": 1e-3, "prior": {}},
        "base": {"name": "tiny", "hash": "2"},
        "data": "6",
    }
    assert metadata_differences(first, second) == {
        "base.hash": ("1", "2"),
        "data": ("5f", "6"),
        "recipe.lr": (3e-3, 1e-3),
        "recipe.prior.weight": (2, 1.0),
    }
    assert metadata_differences(first, first) == {}
    assert metadata_differences({"method": "lora"}, {"method": "loha", "recipe": recipe}) == {
        "method": ("lora", "loha")
    }
