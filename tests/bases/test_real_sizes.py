"""Flow-matching bases at their real sizes, on the device ``meta``."""

import pytest
from torch import nn

from benchmarks.flow_sizes import REAL, RECIPES, planned, real_base
from diffgraft.bases import Base
from diffgraft.bases.layers import choose_layers

BILLIONS = {
    "flux2-klein": 3.88,
    "zimage": 6.15,
    "qwen-image": 20.43,
    "krea2": 12.82,
    "anima": 1.96,
    "qwen-image-21": 7.12,
}
"""Parameters of the transformers"""
LAYERS = {
    "flux2-klein": 5 * 12 + 20 * 2,
    "zimage": 34 * 7,
    "qwen-image": 60 * 12,
    "krea2": 32 * 8,
    "anima": 28 * 10,
    "qwen-image-21": 32 * 7,
}
"""Linear layers of attention and feed-forward networks in all blocks"""
GIGABYTES = {"klein-subject": 8.0, "zimage-subject": 10.0}
"""The most that training at 1024 px may take with 4-bit weights"""


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> Base:
    return real_base(request.param)


def test_it_has_the_published_number_of_parameters_and_layers(real: Base) -> None:
    name = real.family.name
    count = sum(value.numel() for value in real.denoiser.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)
    layers = choose_layers("transformer", real.denoiser, "attention+feedforward")
    assert len(layers) == LAYERS[name]
    assert all(isinstance(real.denoiser.get_submodule(path), nn.Linear) for path in layers)
    assert real.resolution == 1024
    assert real.size_step == (32 if name == "qwen-image-21" else 16)


@pytest.mark.parametrize("recipe", GIGABYTES)
def test_training_fits_small_gpus_by_plan(recipe: str) -> None:
    family = next(name for name, first in RECIPES.items() if recipe.startswith(f"{first}-"))
    number, unit = planned(recipe, real_base(family), "nf4")["memory"].split()
    assert unit == "GB"
    assert 1 < float(number) <= GIGABYTES[recipe]
