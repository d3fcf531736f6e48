"""Sliders of LECO and of ai-toolkit become recipes."""

from pathlib import Path

import pytest

from diffgraft.errors import DiffgraftError
from diffgraft.imports import convert_config
from diffgraft.trainers.objectives.registry import check_objective
from tests.trainers.imports.conftest import Make, told

CONFIG = """
prompts_file: "./prompts.yaml"
pretrained_model: {name_or_path: "stabilityai/stable-diffusion-2-1", v2: true, v_pred: true}
network: {type: "c3lier", rank: 8, alpha: 2.0, training_method: "noxattn"}
train:
  precision: "bfloat16"
  noise_scheduler: "ddim"
  iterations: 700
  lr: 2e-4
  optimizer: "AdamW8bit"
  lr_scheduler: "linear"
  max_denoising_steps: 50
save: {name: "age", path: "./models", per_steps: 100, precision: "bfloat16"}
logging: {use_wandb: true, verbose: false}
other: {use_xformers: true}
"""
PROMPTS = """
- target: "person"
  positive: "an old person"
  unconditional: "a young person"
  neutral: "person"
  action: "enhance"
  guidance_scale: 4
  resolution: 768
  dynamic_resolution: true
  batch_size: 2
- target: "male person"
"""


def test_a_slider_of_leco_becomes_a_recipe(make: Make) -> None:
    recipe, report = make(config_yaml=CONFIG, prompts_yaml=PROMPTS)
    assert (recipe.task, recipe.prompt, recipe.trigger, recipe.images) == ("style", "person", "", "")
    assert recipe.loss.objective == "slider"
    axis = {"positive": "an old person", "negative": "a young person", "guidance": 4.0}
    assert recipe.loss.options == axis
    check_objective("slider", recipe.loss.options)
    assert (recipe.base, recipe.prediction_type) == ("stabilityai/stable-diffusion-2-1", "v_prediction")
    assert (recipe.rank, recipe.alpha, recipe.layers) == (8, 2.0, "all")
    assert (recipe.steps, recipe.lr, recipe.optimizer, recipe.lr_schedule) == (700, 2e-4, "adamw8bit", "linear")
    assert (recipe.precision, recipe.attention, recipe.adapter_every) == ("bfloat16", "xformers", 100)
    assert (recipe.batch, recipe.resolution) == (2, 768)
    said = told(report)
    assert said["prompts"] == ": a slider has one axis: the first entry is used."
    assert "lr_scale" in said["network.training_method"]
    assert "trackers=wandb" in said["logging.use_wandb"]
    assert "one resolution" in said["dynamic_resolution"]
    assert "neutral" not in said


@pytest.mark.parametrize(
    ("entry", "axis"),
    [
        # erased: neutral − g · (positive − unconditional), which counted from the target is one step more
        ("{target: van gogh}", {"positive": "", "negative": "van gogh", "guidance": 2.0}),
        ("{target: van gogh, guidance_scale: 0.5}", {"positive": "", "negative": "van gogh", "guidance": 1.5}),
        (
            "{target: van gogh, action: enhance, guidance_scale: 3}",
            {"positive": "van gogh", "negative": "", "guidance": 2.0},
        ),
        (
            "{target: a dog, positive: a red dog, unconditional: a blue dog, neutral: a dog}",
            {"positive": "a blue dog", "negative": "a red dog", "guidance": 1.0},
        ),
    ],
)
def test_what_leco_erases_becomes_an_axis_from_the_target(entry: str, axis: dict[str, object], make: Make) -> None:
    recipe, report = make(prompts_yaml=f"- {entry}")
    assert recipe.loss.options == axis
    assert "neutral" not in told(report)


def test_what_cannot_be_counted_from_the_target_is_told(make: Make) -> None:
    _, report = make(prompts_yaml="[{target: a dog, positive: a red dog, neutral: a cat, colour: 3}]")
    assert told(report)["neutral"] == ": the shift is added to the prediction for the target."
    assert "not a known key of LECO" in told(report)["colour"]
    _, report = make(prompts_yaml="[{target: a dog, action: enhance}]")
    assert "moves nothing" in report.todos["loss.options.guidance"]


def test_the_prompts_are_found_by_their_name_or_missed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(DiffgraftError, match=r"names the prompts '\./prompts\.yaml', which are not there"):
        convert_config([tmp_path / "config.yaml"])
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    assert convert_config([tmp_path / "config.yaml"]).recipe["prompt"] == "person"


JOB = """
job: train
config:
  name: detail
  process:
    - type: slider
      network: {type: "lierla", linear: 8, linear_alpha: 4}
      train:
        noise_scheduler: "ddpm"
        steps: 500
        lr: 2e-4
        gradient_checkpointing: true
        train_unet: true
        train_text_encoder: false
        min_snr_gamma: 5.0
        optimizer: "adamw"
        lr_scheduler: "constant"
        max_denoising_steps: 40
        batch_size: 1
        dtype: bf16
        noise_offset: 0.05
      model: {name_or_path: "runwayml/stable-diffusion-v1-5", is_v2: false, is_v_pred: false, is_xl: false}
      save: {dtype: float16, save_every: 50, max_step_saves_to_keep: 2}
      sample: {sampler: "ddpm", sample_every: 20, prompts: ["a woman --m -5"]}
      slider:
        resolutions: [[512, 640], [768, 768]]
        batch_full_slide: true
        targets:
          - {target_class: "a room", positive: "a tidy room", negative: "a messy room", weight: 0.5, shuffle: true}
        anchors: [{prompt: "a woman", neg_prompt: "animal", multiplier: 1.0}]
"""


def test_a_slider_of_ai_toolkit_becomes_a_recipe(make: Make) -> None:
    recipe, report = make(job_yaml=JOB)
    axis = {"positive": "a tidy room", "negative": "a messy room", "both": True, "guidance": 1.0}
    assert (recipe.prompt, recipe.loss.objective, recipe.loss.options) == ("a room", "slider", axis)
    check_objective("slider", recipe.loss.options)
    assert (recipe.base, recipe.rank, recipe.alpha) == ("runwayml/stable-diffusion-v1-5", 8, 4.0)
    assert (recipe.steps, recipe.lr, recipe.batch, recipe.precision) == (500, 2e-4, 1, "bfloat16")
    assert (recipe.loss.snr_gamma, recipe.noise.offset, recipe.gradient_checkpointing) == (5.0, 0.05, True)
    assert (recipe.resolution, recipe.sample_every, recipe.adapter_every) == (640, 20, 50)
    said = told(report)
    assert "preserve" in said["slider.anchors"]
    assert {"weight", "shuffle", "target_class", "sample.prompts"} <= said.keys()


def test_its_newer_sliders_have_a_strength_of_their_own(make: Make) -> None:
    slider = {"guidance_strength": 2.5, "positive_prompt": "night", "negative_prompt": "day", "target_class": ""}
    process = {"type": "concept_slider", "train": {"steps": 30, "lr": 0.001}, "slider": slider}
    recipe, _ = make(job_json={"job": "extension", "config": {"process": [process]}})
    assert recipe.loss.options == {"positive": "night", "negative": "day", "guidance": 2.5}
    assert (recipe.prompt, recipe.steps) == ("", 30)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("config: {process: [{type: extract}]}", "of type 'extract': only those of type sd_trainer"),
        ("config: {process: []}", "of type None"),
        ("config: {process: [{type: slider, slider: {targets: []}}]}", "has no slider.targets"),
        ("a: [", "cannot be read as YAML"),
        ("just words", "a configuration needs keys and values"),
    ],
)
def test_other_files_are_refused_with_a_sentence(content: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(DiffgraftError, match=answer):
        convert_config([tmp_path / "config.yaml"])
