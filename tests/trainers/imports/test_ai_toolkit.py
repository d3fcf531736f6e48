"""Training jobs of ai-toolkit become recipes."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diffgraft.errors import DiffgraftError
from diffgraft.imports import convert_config
from tests.trainers.imports.conftest import Make, told

JOB = """
job: extension
config:
  name: "my_lora"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network: {type: "lora", linear: 16, linear_alpha: 12, dropout: 0.1}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "/pictures/of/her"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: true
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
        - folder_path: "/more"
      train:
        batch_size: 2
        steps: 2000
        gradient_accumulation_steps: 3
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        timestep_type: "sigmoid"
        content_or_style: "style"
        optimizer: "adamw8bit"
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        wavelet_loss: true
      model: {name_or_path: "black-forest-labs/FLUX.1-dev", is_flux: true, quantize: true}
      sample:
        sampler: "flowmatch"
        sample_every: 200
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign", "a tree"]
        guidance_scale: 4
meta: {name: "[name]", version: '1.0'}
"""


def test_a_job_becomes_a_recipe_of_captioned_pictures(make: Make) -> None:
    recipe, report = make(config_yaml=JOB)
    assert (recipe.task, recipe.base, recipe.images) == ("style", "black-forest-labs/FLUX.1-dev", "/pictures/of/her")
    assert (recipe.method, recipe.rank, recipe.alpha, recipe.layers) == ("lora", 16, 12.0, "attention+feedforward")
    assert (recipe.trigger, recipe.insert_trigger) == ("p3r5on", True)
    assert (recipe.steps, recipe.batch, recipe.accumulate, recipe.lr) == (2000, 2, 3, 1e-4)
    assert (recipe.optimizer, recipe.precision, recipe.ema, recipe.quantize) == ("adamw8bit", "bfloat16", 0.99, "int8")
    assert (recipe.gradient_checkpointing, recipe.text_encoder) == (True, False)
    assert (recipe.timesteps.distribution, recipe.timesteps.shift) == ("logit-normal", 1.0)
    assert (recipe.caption_dropout, recipe.tags.shuffle, recipe.resolution) == (0.05, True, 1024)
    assert recipe.buckets.use
    assert (recipe.adapter_every, recipe.sample_every) == (250, 200)
    assert recipe.sample_prompts == ["{trigger} holding a sign", "a tree"]
    assert recipe.prior.weight == 0
    said = told(report)
    assert "options.dropout" in said["network.dropout"]
    assert "timesteps.mean" in said["train.content_or_style"]
    assert "the first is used" in said["datasets"]
    assert "not a known key of ai-toolkit" in said["train.wavelet_loss"]
    assert "device" not in said


@pytest.mark.parametrize(
    ("kind", "distribution", "shift"),
    [("linear", "uniform", 1.0), ("weighted", "uniform", 1.0), ("shift", "uniform", "size")],
)
def test_kinds_of_timesteps(kind: str, distribution: str, shift: Any, make: Make) -> None:
    recipe, _ = make(config_yaml=JOB.replace('timestep_type: "sigmoid"', f'timestep_type: "{kind}"'))
    assert (recipe.timesteps.distribution, recipe.timesteps.shift) == (distribution, shift)


def test_a_job_for_stable_diffusion_has_no_kind_of_timesteps(make: Make) -> None:
    recipe, _ = make(config_yaml=JOB.replace("is_flux: true, quantize: true", "is_xl: true"))
    assert (recipe.timesteps.distribution, recipe.layers, recipe.quantize) == ("uniform", "attention", "none")


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("config: {process: [{type: sd_trainer}]}", "names no pictures: its first process needs datasets"),
        ("config: {process: [{type: sd_trainer, datasets: [{}]}]}", "names no pictures"),
        ("config: {process: [{type: sd_trainer, datasets: 5}]}", "names no pictures"),
        (
            "config: {process: [{type: reference}]}",
            "of type .reference.: only those of type sd_trainer",
        ),
    ],
)
def test_jobs_without_pictures_are_refused(content: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(DiffgraftError, match=answer):
        convert_config([tmp_path / "config.yaml"])


@pytest.mark.parametrize("value", ["[]", "{a: 1}", "null", "'x'", "-3", "1e999", "true"])
@pytest.mark.parametrize("key", ["batch_size: 2", "lr: 1e-4", 'timestep_type: "sigmoid"', "steps: 2000"])
def test_strange_values_are_answered_in_a_sentence(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(JOB.replace(key, f"{key.partition(':')[0]}: {value}"))
    with suppress(DiffgraftError):
        report = convert_config([tmp_path / "config.yaml"])
        assert report.recipe["images"] == "/pictures/of/her"


def test_what_has_no_meaning_for_a_transformer_is_dropped(make: Make) -> None:
    job = JOB.replace("batch_size: 2", "min_snr_gamma: 5.0\n        noise_offset: 0.1\n        batch_size: 2")
    recipe, report = make(config_yaml=job.replace("[trigger] holding", "[trigger] {in} holding"))
    assert (recipe.loss.snr_gamma, recipe.noise.offset) == (None, 0.0)
    assert "no meaning for flow matching" in told(report)["train.min_snr_gamma"]
    assert "no meaning for flow matching" in told(report)["train.noise_offset"]
    assert recipe.sample_prompts[0] == "{trigger} (in) holding a sign"


def test_sections_need_keys_and_values(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("config: {process: [{type: sd_trainer, train: [1]}]}")
    with pytest.raises(DiffgraftError, match=r"has train=\[1\]: this section needs keys and values"):
        convert_config([tmp_path / "config.yaml"])
