"""Recipes made of configurations of sd-scripts for FLUX.1 and Stable Diffusion 3."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.diffusion.noise import draw_timestep
from diffgraft.errors import DiffgraftError
from diffgraft.imports import kohya_flow
from tests.trainers.imports.conftest import Make, told

HEAD = 'train_data_dir = "/nowhere"\nnetwork_dim = 16\nnetwork_alpha = 8\nlearning_rate = 1e-4\n'
FLUX = HEAD + 'network_module = "networks.lora_flux"\npretrained_model_name_or_path = "flux1-dev.safetensors"\n'
SD3 = HEAD + 'network_module = "networks.lora_sd3"\npretrained_model_name_or_path = "sd3.5_medium.safetensors"\n'


def test_all_arguments_of_these_scripts_are_known_and_no_others() -> None:
    names = (Path(__file__).parent / "sd-scripts-flow.txt").read_text("utf-8").split()
    assert set(kohya_flow.DEFAULTS) == set(names)


def test_a_lora_of_flux_becomes_a_recipe(make: Make) -> None:
    more = """
ae = "ae.safetensors"
t5xxl = "t5xxl_fp16.safetensors"
guidance_scale = 1.0
model_prediction_type = "raw"
timestep_sampling = "shift"
discrete_flow_shift = 3.1582
sigmoid_scale = 0.8
blocks_to_swap = 18
noise_offset = 0.05
min_snr_gamma = 5
network_args = ["train_blocks=single", "split_qkv=True"]
"""
    recipe, report = make(flux_toml=FLUX + more)
    assert (recipe.base, recipe.method, recipe.layers) == ("flux1-dev.safetensors", "lora", "all")
    assert (recipe.rank, recipe.alpha_or_rank()) == (16, 8)
    assert (recipe.text_encoder, recipe.lr_scale) == (True, {"text_encoder_2": 0.0})  # the CLIP, and not T5
    times = recipe.timesteps
    assert (times.distribution, times.mean, times.std, times.shift) == ("logit-normal", 0, 0.8, 3.1582)
    assert (recipe.loss.snr_gamma, recipe.noise.offset) == (None, 0)
    said = told(report)
    assert "flow matching" in said["min_snr_gamma"]
    assert "flow matching" in said["noise_offset"]
    assert "components" in said["ae"]
    assert "components" in report.todos
    assert "lr_scale" in said["network_args train_blocks"]
    assert "guidance_scale" not in said
    assert "blocks_to_swap" in report.defaulted_keys()


@pytest.mark.parametrize(
    ("head", "more", "expected"),
    [
        (FLUX, "", {"distribution": "uniform", "shift": 3.0}),  # by default as the noise schedule of FLUX.1 is set up
        (FLUX, 'timestep_sampling = "uniform"', {"distribution": "uniform", "shift": 1.0}),
        (FLUX, 'timestep_sampling = "sigmoid"', {"distribution": "logit-normal", "mean": 0, "std": 1, "shift": 1}),
        (FLUX, 'timestep_sampling = "flux_shift"', {"distribution": "logit-normal", "shift": "size"}),
        (FLUX, 'weighting_scheme = "logit_normal"\nlogit_mean = 0.5', {"mean": -0.5, "shift": 3.0}),
        (SD3, "", {"distribution": "uniform", "shift": 1.0}),
        (
            SD3,
            'weighting_scheme = "logit_normal"\nlogit_mean = 0.5\nlogit_std = 2',
            {"mean": 0.5, "std": 2, "shift": 1},
        ),
        (SD3, "training_shift = 2.5", {"distribution": "uniform", "shift": 2.5}),
    ],
)
def test_timesteps_are_those_of_the_script(make: Make, head: str, more: str, expected: dict[str, Any]) -> None:
    recipe, _ = make(one_toml=head + more)
    assert {key: getattr(recipe.timesteps, key) for key in expected} == expected


def theirs(script: str, options: dict[str, float], count: int) -> torch.Tensor:
    """Shares of noise as sd-scripts draws them with weighting_scheme=logit_normal."""
    drawn = torch.sigmoid(options["logit_mean"] + options["logit_std"] * torch.randn(count))
    shift = options["shift"]
    if script == "sd3":
        return drawn * shift / (1 + (shift - 1) * drawn)
    schedule = torch.arange(1000, 0, -1) / 1000  # FlowMatchEulerDiscreteScheduler lists it from noise to picture
    return (shift * schedule / (1 + (shift - 1) * schedule))[(drawn * 1000).long().clamp(max=999)]


@pytest.mark.parametrize("script", ["flux", "sd3"])
def test_they_have_the_distribution_of_the_script(script: str, make: Make) -> None:
    key = "training_shift" if script == "sd3" else "discrete_flow_shift"
    options = {"logit_mean": 0.7, "logit_std": 0.6, "shift": 1.8}
    more = f'weighting_scheme = "logit_normal"\nlogit_mean = 0.7\nlogit_std = 0.6\n{key} = 1.8'
    recipe, _ = make(one_toml=(SD3 if script == "sd3" else FLUX) + more)
    torch.manual_seed(0)
    shift = recipe.timesteps.shift
    assert isinstance(shift, float)
    ours = torch.tensor([draw_timestep(1000, recipe.timesteps, (0, row), shift) / 1000 for row in range(4000)])
    levels = torch.linspace(0, 1, 257)
    shares = [(drawn[:, None] <= levels).float().mean(0) for drawn in (ours, theirs(script, options, 4000))]
    assert (shares[0] - shares[1]).abs().max() < 0.036  # of two equal distributions, in 99 of 100 cases


def test_what_is_different_is_told(make: Make) -> None:
    _, report = make(one_toml=FLUX + 'weighting_scheme = "cosmap"\nmodel_type = "chroma"\nt5xxl_max_token_length = 256')
    said = told(report)
    assert {"weighting_scheme", "model_type", "t5xxl_max_token_length", "model_prediction_type", "guidance_scale"} <= {
        *said
    }


def test_lycoris_on_flux_is_known_by_its_parts(make: Make) -> None:
    head = HEAD + 'network_module = "lycoris.kohya"\nnetwork_args = ["algo=lokr", "factor=8"]\nae = "ae.safetensors"\n'
    recipe, report = make(one_toml=head)
    assert (recipe.method, recipe.options["factor"], recipe.timesteps.shift) == ("lokr", 8, 3.0)
    assert "components" in report.todos


@pytest.mark.parametrize("module", ["networks.lora_anima", "networks.lora_lumina"])
def test_other_families_are_refused(make: Make, module: str) -> None:
    with pytest.raises(DiffgraftError, match=r"only Stable Diffusion 1.x, 2.x, 3 and XL, and FLUX.1"):
        make(one_toml=HEAD + f'network_module = "{module}"\n')
