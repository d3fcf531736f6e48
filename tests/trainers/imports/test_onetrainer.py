"""Recipes made of OneTrainer's configurations and concepts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.diffusion.losses import timestep_weights
from diffgraft.diffusion.parameterizations import Epsilon
from diffgraft.errors import DiffgraftError
from diffgraft.imports import convert_config
from tests.trainers.imports.conftest import Make, told

CONCEPTS: list[dict[str, Any]] = [
    {
        **{"__version": 2, "name": "dog", "path": "img/3_sks dog", "enabled": True, "type": "STANDARD"},
        **{"balancing": 4.0, "balancing_strategy": "REPEATS", "loss_weight": 0.5, "image_variations": 3},
        "image": {"enable_crop_jitter": True, "enable_random_flip": True, "enable_random_rotate": False},
        "text": {"prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2, "tag_delimiter": ","},
    }
]
CONFIG: dict[str, Any] = {
    **{"__version": 11, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "peft_type": "LORA"},
    **{"base_model_name": "sd15", "lora_rank": 12, "lora_alpha": 3.0, "layer_filter_preset": "attn-mlp"},
    **{"learning_rate": 4e-4, "learning_rate_scheduler": "COSINE", "learning_rate_warmup_steps": 20.0},
    **{"epochs": 10, "batch_size": 2, "gradient_accumulation_steps": 2, "train_dtype": "BFLOAT_16"},
    **{"resolution": "640", "aspect_ratio_bucketing": False, "clip_grad_norm": 1.5, "tensorboard": False},
    **{"ema": "GPU", "ema_decay": 0.99, "ema_update_step_interval": 5},
    **{"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0, "offset_noise_weight": 0.03},
    **{"min_noising_strength": 0.1, "max_noising_strength": 0.8, "timestep_distribution": "LOGIT_NORMAL"},
    **{"noising_bias": 0.3, "noising_weight": 0.5, "masked_training": True, "unmasked_weight": 0.2},
    **{"normalize_masked_area_loss": True, "save_every": 40, "save_every_unit": "STEP"},
    "unet": {"learning_rate": None, "weight_dtype": "FLOAT_16", "gradient_checkpointing": False},
    "text_encoder": {
        **{"train": True, "learning_rate": 1e-4, "stop_training_after": 4, "stop_training_after_unit": "EPOCH"},
        "dropout_probability": 0.1,
    },
    "optimizer": {"optimizer": "ADAMW_8BIT", "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.99, "block_wise": True},
    "samples": [{"prompt": "a sks dog", "enabled": True, "width": 512}, {"prompt": "a cat", "enabled": False}],
    **{"cloud": {"enabled": False}, "secrets": {"huggingface_token": "hf_1"}},
}


@pytest.mark.usefixtures("kohya_folder")
def test_text_encoders_that_stop_apart_are_told_of_by_the_one_that_stops(make: Make) -> None:
    xl = {**CONFIG, "model_type": "STABLE_DIFFUSION_XL_10_BASE"}
    recipe, report = make(config_json=xl, concepts_json=CONCEPTS)
    assert recipe.text_encoder_stop is None
    assert "only text_encoder after 12 steps stops" in told(report)["text_encoder.stop_training_after"]
    both = {**xl, "text_encoder_2": CONFIG["text_encoder"]}
    recipe, report = make(config_json=both, concepts_json=CONCEPTS)
    assert recipe.text_encoder_stop == 12
    assert "text_encoder.stop_training_after" not in told(report)


@pytest.mark.usefixtures("kohya_folder")
def test_a_configuration_and_its_concepts_become_a_recipe(make: Make) -> None:
    recipe, report = make(config_json=CONFIG, concepts_json=CONCEPTS)
    assert (recipe.task, recipe.base, recipe.method, recipe.layers) == (
        "style",
        "sd15",
        "lora",
        "attention+feedforward",
    )
    assert (recipe.layers, recipe.rank, recipe.alpha_or_rank(), recipe.lr) == ("attention+feedforward", 12, 3, 4e-4)
    assert (recipe.text_encoder, recipe.lr_scale) == (True, {"text_encoder": 0.25})
    in_epoch = math.ceil(math.ceil(3 * 4 / 2) / 2)
    assert (recipe.steps, recipe.text_encoder_stop) == (10 * in_epoch, 4 * in_epoch)
    assert (recipe.batch, recipe.accumulate, recipe.warmup, recipe.adapter_every) == (2, 2, 10, 20)  # there: batches
    assert (recipe.lr_schedule, recipe.precision, recipe.gradient_checkpointing) == ("cosine", "bfloat16", False)
    assert (recipe.optimizer, recipe.weight_decay, recipe.max_grad_norm) == ("adamw8bit", 0.02, 1.5)
    assert recipe.ema == pytest.approx(0.99 ** (1 / 5))
    assert (recipe.images, recipe.repeats, recipe.weight, recipe.flip) == ("img/3_sks dog", 4, 0.5, True)
    assert (recipe.crop, recipe.crops, recipe.buckets.use, recipe.resolution) == ("random", 3, False, 640)
    assert (recipe.tags.shuffle, recipe.tags.keep, recipe.caption_dropout) == (True, 2, 0.1)
    assert (recipe.masks.use, recipe.masks.outside, recipe.masks.normalize) == (True, 0.2, True)
    times = recipe.timesteps
    assert (times.min, times.max, times.distribution, times.mean, times.std) == (100, 799, "logit-normal", 0.3, 1.5)
    assert (recipe.loss.snr_gamma, recipe.noise.offset, recipe.sample_prompts) == (4, 0.03, ["a sks dog"])
    assert set(told(report)) == {"optimizer.beta2"}
    assert "hf_1" not in str(report.sections())
    said = {key if key != "__version" else "" for key in CONFIG} - {"unet", "text_encoder", "optimizer", ""}
    spoken = " ".join([str(line) for _, line in report.mapped] + report.defaulted_keys())
    assert {key for key in said if key not in spoken} == set()


def test_what_the_file_does_not_say_is_as_there(make: Make) -> None:
    """Defaults of OneTrainer that are not ours are written: half precision, a warm-up, buckets, random crops."""
    recipe, report = make(config_json={"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"})
    assert (recipe.rank, recipe.alpha_or_rank(), recipe.lr, recipe.warmup) == (16, 1, 3e-6, 200)
    assert (recipe.precision, recipe.gradient_checkpointing, recipe.buckets.use) == ("float16", True, True)
    assert (recipe.layers, recipe.trackers, recipe.batch) == ("all", ["tensorboard"], 1)
    assert set(report.todos) == {"images", "steps"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"peft_type": "LOHA", "layer_filter": "attn"}, {"method": "loha", "layers": "attention"}),
        ({"peft_type": "LOKR", "lokr_dim": 5, "lokr_decompose_factor": 8}, {"rank": 5, "options": {"factor": 8}}),
        ({"peft_type": "LOKR", "lokr_full_matrix": True}, {"options": {"factor": -1, "full_matrix": True}}),
        ({"lora_decompose": True, "lora_decompose_output_axis": True}, {"options": {"dora": True}}),
        ({"training_method": "FINE_TUNE"}, {"method": "full", "text_encoder": True}),
        ({"text_encoder": {"train": False}}, {"text_encoder": False, "lr_scale": {}}),
        ({"unet": {"train": False}}, {"text_encoder": True, "lr_scale": {"unet": 0.0}}),
        ({"unet": {"weight_dtype": "NFLOAT_4"}}, {"quantize": "nf4"}),
        ({"force_v_prediction": True}, {"prediction_type": "v_prediction", "zero_snr": None}),
        ({"rescale_noise_scheduler_to_zero_terminal_snr": True}, {"zero_snr": True}),
        ({"rescale_noise_scheduler_to_zero_terminal_snr": True}, {"prediction_type": "v_prediction"}),
        ({"learning_rate_scaler": "BOTH", "batch_size": 2, "gradient_accumulation_steps": 8}, {"lr": 3e-6 * 4}),
        ({"learning_rate_warmup_steps": 0.5, "learning_rate_scheduler": "LINEAR"}, {"lr_schedule": "linear"}),
        ({"lora_model_name": "before.safetensors"}, {"init_from": "before.safetensors"}),
        ({"latent_caching": False, "clip_grad_norm": None}, {"cache": False, "max_grad_norm": 1e9}),
        ({"optimizer": {"optimizer": "LION"}}, {"optimizer": "lion", "weight_decay": 0.0}),
        ({"gradient_checkpointing": "OFF", "__version": 8}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": False, "__version": 4}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": "CPU_OFFLOADED", "__version": 8}, {"gradient_checkpointing": True}),
        ({"min_snr_gamma": 0, "save_after": 30, "save_after_unit": "STEP", "__version": 2}, {"adapter_every": 30}),
        ({"min_snr_gamma": 3, "__version": 2}, {"loss": {"snr_gamma": 3.0}}),
        ({"lora_layer_preset": "attn-only", "__version": 6}, {"layers": "attention"}),
        ({"timestep_shift": 2.0}, {"timesteps": {"shift": 2.0}}),
    ],
)
def test_single_settings(make: Make, more: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe, _ = make(config_json={"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", **more})
    found = recipe.model_dump()
    assert {
        key: value if not isinstance(value, dict) else {**found[key], **value} for key, value in expected.items()
    } == {key: found[key] for key in expected}


FLOW = {
    **{"training_method": "LORA", "base_model_name": "parts", "lora_rank": 12, "lora_alpha": 6.0},
    **{"learning_rate": 2e-4, "loss_weight_fn": "MIN_SNR_GAMMA", "offset_noise_weight": 0.02},
    "unet": {"learning_rate": 7.0, "weight_dtype": "INT_8"},  # every file has it, whatever the model is
    "transformer": {
        **{"learning_rate": 1e-4, "weight_dtype": "NFLOAT_4", "gradient_checkpointing": True},
        **{"guidance_scale": 3.5, "model_name": "transformer.safetensors"},
    },
}


@pytest.mark.parametrize("model", ["FLUX_DEV_1", "FLUX_2", "Z_IMAGE", "QWEN", "KREA_2", "STABLE_DIFFUSION_35"])
def test_transformers_have_their_settings_in_a_group_of_their_own(make: Make, model: str) -> None:
    recipe, report = make(config_json={**FLOW, "model_type": model, "dynamic_timestep_shifting": True})
    assert (recipe.base, recipe.components) == ("transformer.safetensors", "parts")
    assert (recipe.lr, recipe.rank, recipe.quantize) == (1e-4, 12, "nf4")
    assert (recipe.timesteps.shift, recipe.loss.snr_gamma, recipe.noise.offset) == ("size", None, 0)
    said = told(report)
    assert "no meaning for flow matching" in said["offset_noise_weight"]
    assert "embedded guidance of 1" in said["transformer.guidance_scale"]
    assert not any(key.startswith("unet.") for key in said)
    assert ("model_type" in said) == (model == "FLUX_2")


def test_only_encoders_that_learn_there_learn_here(make: Make) -> None:
    head = {**FLOW, "timestep_shift": 3.0, "text_encoder_2": {"train": False}}
    recipe, _ = make(config_json={**head, "model_type": "STABLE_DIFFUSION_3"})
    assert recipe.lr_scale == {"text_encoder": 2.0, "text_encoder_2": 0.0, "text_encoder_3": 0.0}
    assert recipe.timesteps.shift == 3.0
    recipe, _ = make(config_json={**head, "model_type": "FLUX_DEV_1", "text_encoder": {"train": False}})
    assert (recipe.text_encoder, recipe.lr_scale) == (False, {})


def test_text_encoders_of_xl_may_learn_apart(make: Make) -> None:
    head = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}
    parts = {"text_encoder": {"train": True, "learning_rate": 6e-6}, "text_encoder_2": {"train": False}}
    recipe, _ = make(config_json={**head, **parts})
    assert (recipe.text_encoder, recipe.lr_scale) == (True, {"text_encoder": 2.0, "text_encoder_2": 0.0})
    recipe, _ = make(config_json={**head, "text_encoder": {"train": False}, "text_encoder_2": {"train": False}})
    assert (recipe.text_encoder, recipe.lr_scale) == (False, {})


def test_a_word_of_its_own(make: Make) -> None:
    word = {"placeholder": "<dog>", "token_count": 3, "initial_embedding_text": "a dog", "model_name": ""}
    head = {"training_method": "EMBEDDING", "model_type": "STABLE_DIFFUSION_15", "embedding_learning_rate": 2e-3}
    recipe, _ = make(config_json={**head, "embedding": word, "preserve_embedding_norm": True})
    assert (recipe.task, recipe.method, recipe.trigger, recipe.lr) == ("concept", "textual-inversion", "<dog>", 2e-3)
    assert recipe.options == {"vectors": 3, "start": "a dog", "keep_norm": True}


def test_several_concepts(make: Make, kohya_folder: Path) -> None:
    (kohya_folder / "prompts.txt").write_text("a sks cat\n", "utf-8")
    cat = {
        **{"name": "cat", "path": "img/1_sks cat", "balancing": 1.0, "type": "STANDARD"},
        "text": {"prompt_source": "concept", "prompt_path": "prompts.txt"},
        "image": {"enable_random_flip": False},
    }
    aside = [{"path": "held", "type": "VALIDATION"}, {"path": "class", "type": "PRIOR_PREDICTION"}]
    concepts = [*CONCEPTS, cat, *aside, {"path": "off", "name": "off", "enabled": False}]
    recipe, report = make(config_json={**CONFIG, "validation": True}, concepts_json=concepts)
    assert [(one.images, one.repeats, one.weight, one.prompt) for one in recipe.concepts] == [
        ("img/3_sks dog", 4, 0.5, None),
        ("img/1_sks cat", 1, None, "a sks cat"),
    ]
    assert recipe.steps == 10 * math.ceil(math.ceil((12 + 2) / 2) / 2)
    assert (recipe.validation.images, recipe.flip, recipe.captions.use) == ("held", False, True)
    assert {"concepts.image.enable_random_flip", "concept class, type", "concept off, enabled"} <= set(told(report))
    inline, _ = make(config_json={**CONFIG, "validation": True, "concepts": concepts})
    assert inline == recipe


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        ({"perturbation_noise_weight": 0.1}, "perturbation_noise_weight", "also perturbs the noise to be predicted"),
        ({"huber_strength": 1.0}, "huber_strength", "twice as large"),
        ({"loss_weight_fn": "P2"}, "loss_weight_fn", "loss.snr_gamma"),
        ({"timestep_distribution": "SIGMOID"}, "timestep_distribution", "logit-normal"),
        ({"peft_type": "OFT_2"}, "peft_type", "replaced by method=lora"),
        ({"lora_decompose": True}, "lora_decompose_output_axis", "each output"),
        ({"learning_rate_scheduler": "REX"}, "learning_rate_scheduler", "constant"),
        ({"learning_rate_scheduler": "COSINE_WITH_RESTARTS"}, "learning_rate_scheduler", "constant"),
        ({"sample_after": 10, "sample_after_unit": "MINUTE"}, "sample_after", "minutes are not supported"),
        ({"unmasked_probability": 0.3}, "unmasked_probability", "every step"),
        ({"optimizer": {"optimizer": "CAME"}}, "optimizer.optimizer", "adamw"),
        ({"optimizer": {"optimizer": "ADAMW", "cautious": True}}, "optimizer.cautious", "has no such setting"),
        ({"optimizer": {"optimizer": "ADAMW", "betta": 1}}, "optimizer.betta", "not a known setting"),
        ({"additional_embeddings": [{"placeholder": "<a>"}]}, "additional_embeddings", "method=pivotal"),
        ({"layer_filter": "down_blocks.1"}, "layer_filter", "patterns"),
        ({"lora_rnak": 3}, "lora_rnak", "did you mean 'lora_rank'"),
        (
            {"concepts": [{"path": "p", "text": {"tag_dropout_enable": True}}]},
            "concepts.text.tag_dropout_mode",
            "one by",
        ),
        ({"concepts": [{"path": "p", "balancing": 0.5}]}, "concept p, balancing", "must be an integer"),
        ({"concepts": [{"path": "p", "text": {"prompt_source": "filename"}}]}, "concept p, text.prompt_source", ".txt"),
        ({"concepts": [{"path": "p", "colour": 1}]}, "concepts.colour", "not a known key of concepts"),
    ],
)
def test_what_has_no_counterpart_is_told_with_its_value(make: Make, more: dict[str, Any], key: str, said: str) -> None:
    _, report = make(config_json={"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", **more})
    assert said in told(report)[key]


def test_debiased_weights_are_the_same_numbers_as_there(make: Make) -> None:
    """Where ε is predicted; of v OneTrainer has the root of it, which is said."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    times = torch.tensor([0, 420, 977])
    head = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "loss_weight_fn": "DEBIASED_ESTIMATION"}
    recipe, report = make(config_json=head)
    snr = (alphas[times] / (1 - alphas[times])).clip(max=1e3)
    torch.testing.assert_close(timestep_weights(times, Epsilon(alphas), recipe.loss).double(), snr.rsqrt())
    assert any("for v" in str(line) for _, line in report.mapped)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"training_method": "LORA", "model_type": "SANA"}, "model_type=SANA is not supported"),
        ({"training_method": "FINE_TUNE_VAE"}, "FINE_TUNE_VAE is not supported"),
        ({"training_method": "LORA", "lora_rank": "big"}, r"lora_rank='big' .* must be a number"),
        ({"training_method": "LORA", "concepts": {"path": "x"}}, "must be a list of objects"),
    ],
)
def test_configurations_that_will_not_do_are_answered(make: Make, content: dict[str, Any], answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        make(config_json=content)


def test_a_recipe_is_not_written_over(make: Make, tmp_path: Path) -> None:
    from diffgraft.imports import write_recipe

    config = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}
    make(config_json=config)
    report = convert_config([tmp_path / "config.json"])
    with pytest.raises(DiffgraftError, match="exists already"):
        write_recipe(report, tmp_path / "recipe.yaml", "config.json")
    with pytest.raises(DiffgraftError, match="should end in"):
        write_recipe(report, tmp_path / "recipe.txt", "config.json")


@pytest.mark.usefixtures("kohya_folder")
def test_captions_of_several_lines_come_in_turn_as_there(make: Make) -> None:
    recipe, report = make(config_json=CONFIG, concepts_json=CONCEPTS)
    assert recipe.captions.lines == "random"
    assert any(line.key == "concept text.prompt_source" for _, line in report.mapped)
