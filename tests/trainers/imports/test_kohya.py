"""Recipes made of configurations of kohya's sd-scripts and its GUI."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffgraft.diffusion.losses import elementwise_loss, timestep_weights
from diffgraft.diffusion.parameterizations import Epsilon, V
from diffgraft.errors import DiffgraftError
from diffgraft.imports import convert_config
from diffgraft.trainers.recipe.settings import Loss
from tests.trainers.imports.conftest import Make, told

LORA = """
[model]
pretrained_model_name_or_path = "sd15.safetensors"
[network]
network_module = "networks.lora"
network_dim = 24
network_alpha = 6
unet_lr = 2e-4
text_encoder_lr = 5e-5
[training]
optimizer_type = "Lion8bit"
optimizer_args = ["weight_decay=0.05", "betas=(0.9, 0.95)"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.1
max_train_steps = 900
train_batch_size = 3
gradient_accumulation_steps = 2
mixed_precision = "bf16"
gradient_checkpointing = true
max_grad_norm = 0.0
seed = 7
xformers = true
[data]
train_data_dir = "/nowhere"
resolution = "640,640"
enable_bucket = true
min_bucket_reso = 320
bucket_reso_steps = 32
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2
caption_tag_dropout_rate = 0.2
caption_dropout_rate = 0.1
flip_aug = true
max_token_length = 225
[noise]
noise_offset = 0.06
multires_noise_iterations = 6
multires_noise_discount = 0.4
min_snr_gamma = 5
min_timestep = 20
max_timestep = 900
loss_type = "huber"
huber_schedule = "exponential"
huber_c = 0.2
"""


def test_a_lora_configuration_becomes_a_recipe(make: Make) -> None:
    recipe, report = make(lora_toml=LORA)
    assert (recipe.task, recipe.base, recipe.method) == ("style", "sd15.safetensors", "lora")
    assert (recipe.layers, recipe.rank, recipe.alpha_or_rank()) == ("attention+feedforward", 24, 6)
    assert (recipe.lr, recipe.text_encoder, recipe.lr_scale) == (2e-4, True, {"text_encoder": 0.25})
    assert (recipe.optimizer, recipe.weight_decay, recipe.max_grad_norm) == ("lion8bit", 0.05, 1e9)
    assert (recipe.lr_schedule, recipe.lr_cycles, recipe.warmup, recipe.steps) == ("cosine_with_restarts", 3, 90, 900)
    assert (recipe.batch, recipe.accumulate, recipe.precision, recipe.seed) == (3, 2, "bfloat16", 7)
    assert (recipe.images, recipe.resolution, recipe.flip, recipe.gradient_checkpointing) == (
        "/nowhere",
        640,
        True,
        True,
    )
    buckets = recipe.buckets
    assert (buckets.use, buckets.step, buckets.min, buckets.max, buckets.upscale) == (True, 32, 320, 1024, True)
    assert (recipe.tags.shuffle, recipe.tags.keep, recipe.tags.drop, recipe.caption_dropout) == (True, 2, 0.2, 0.1)
    words = recipe.captions.use, recipe.long_prompts, recipe.samples()[0]
    assert words == (
        True,
        "chunk",
        "a dog on the grass,  style",
    )
    assert (recipe.noise.offset, recipe.noise.pyramid) == (0.06, 0.4)
    assert (recipe.timesteps.min, recipe.timesteps.max) == (20, 899)  # the end is not included there
    assert (recipe.loss.kind, recipe.loss.schedule, recipe.loss.delta, recipe.loss.snr_gamma) == (
        *("huber", "exponential", 0.2),
        5,
    )
    assert (recipe.sample_every, getattr(recipe, "prior").weight) == (0, 0)  # noqa: B009  (of style recipes)
    assert set(told(report)) == {"multires_noise_iterations", "optimizer_args betas"}
    assert report.defaulted_keys() == ["network_module", "xformers", "caption_extension"]


def test_what_the_file_does_not_say_is_as_there(make: Make) -> None:
    """Defaults of sd-scripts that are not ours are written: a scale of 1 / 4, a rate of 2e-6, one picture a step."""
    recipe, report = make(bare_toml='network_module = "networks.lora"\ntrain_data_dir = "/nowhere"')
    assert (recipe.rank, recipe.alpha_or_rank(), recipe.lr, recipe.batch, recipe.steps) == (4, 1, 2e-6, 1, 1600)
    assert (recipe.precision, recipe.text_encoder, recipe.loss) == ("float32", True, Loss())
    assert recipe.captions.use  # of .caption files, which are the default there
    assert "remove those that should not be read" in told(report)["caption_extension"]  # .caption, by default
    assert any(line.key == "network_dim" and ", the default of sd-scripts" in str(line) for _, line in report.mapped)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ('network_args = ["conv_dim=8", "conv_alpha=4"]', {"method": "locon", "layers": "all"}),
        ('network_args = ["conv_dim=8", "conv_alpha=4"]', {"options": {"conv_rank": 8, "conv_alpha": 4.0}}),
        ('network_args = ["conv_dim=4", "conv_alpha=1"]', {"options": {}, "method": "locon"}),
        ('network_args = ["loraplus_lr_ratio=16"]', {"options": {"loraplus_ratio": 16.0}}),
        ("network_alpha = 0", {"alpha": 4.0}),  # there it means the rank
        ("network_train_unet_only = true", {"text_encoder": False, "lr_scale": {}}),
        ("text_encoder_lr = 0.0", {"text_encoder": False}),
        ("text_encoder_lr = [1e-6, 0.0]", {"lr_scale": {"text_encoder": 0.5, "text_encoder_2": 0.0}}),
        ("text_encoder_lr = [1e-6, 1e-6]", {"lr_scale": {"text_encoder": 0.5}}),
        ("network_train_text_encoder_only = true", {"lr_scale": {"unet": 0.0}, "text_encoder": True}),
        ('network_weights = "before.safetensors"', {"init_from": "before.safetensors"}),
        ("v_parameterization = true\nzero_terminal_snr = true", {"prediction_type": "v_prediction", "zero_snr": True}),
        ("random_crop = true\nalpha_mask = true", {"crop": "random"}),
        ('log_with = "all"\nlogging_dir = "logs"', {"trackers": ["tensorboard", "wandb"]}),
        ('logging_dir = "logs"', {"trackers": ["tensorboard"]}),
        ("save_every_n_steps = 250\nsample_every_n_steps = 90", {"adapter_every": 250, "sample_every": 90}),
        ('lr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 30', {"lr_schedule": "constant", "warmup": 30}),
        ('lr_scheduler = "polynomial"', {"lr_schedule": "linear"}),
        ('optimizer_type = "Lion"', {"optimizer": "lion", "weight_decay": 0.0}),
        ("use_8bit_adam = true", {"optimizer": "adamw8bit", "weight_decay": 0.01}),
        ('optimizer_type = "AdamWScheduleFree"\nlr_scheduler = "cosine"', {"optimizer": "schedule-free"}),
        ('optimizer_type = "DAdaptAdam"\nlearning_rate = 1.0', {"optimizer": "prodigy", "lr": 1.0}),
        (
            'caption_prefix = "sks,"\ncaption_suffix = "on film"',
            {"caption": "sks, {caption} on film", "trigger": "sks"},
        ),
        ("torch_compile = true\nvalidation_split = 0.2", {"compile": True}),
    ],
)
def test_single_settings(make: Make, more: str, expected: dict[str, Any]) -> None:
    head = 'network_module = "networks.lora"\nnetwork_dim = 4\ntrain_data_dir = "/nowhere"\n'
    recipe, _ = make(one_toml=head + more)
    assert {key: getattr(recipe, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected", "lost"),
    [
        (["algo=locon", "conv_dim=2", "conv_alpha=1", "dora_wd=True"], ("locon", "all", {"dora": True}), "preset"),
        (["algo=loha", "preset=attn-mlp", "conv_dim=2"], ("loha", "attention+feedforward", {}), ""),
        (["algo=loha", "preset=unet-only", "use_tucker=True"], ("loha", "all", {"tucker": True}), "preset"),
        (
            ["algo=lokr", "factor=6", "full_matrix=True", "preset=attn-only"],
            ("lokr", "attention", {"factor": 6, "full_matrix": True}),
            "",
        ),
        (["algo=lokr", "decompose_both=True", "dora_wd=True"], ("lokr", "all", {"decompose_both": True}), "dora_wd"),
        (["algo=full"], ("full", None, {}), "algo"),
        (["algo=ia3"], ("lora", "all", {}), "algo"),
        (["algo=lora", "rank_dropout=0.1", "bypass_mode=False"], ("locon", "all", {}), "rank_dropout"),
    ],
)
def test_networks_of_lycoris(
    make: Make, words: list[str], expected: tuple[str, str | None, dict[str, Any]], lost: str
) -> None:
    said = f'network_module = "lycoris.kohya"\nnetwork_dim = 6\nnetwork_alpha = 3\nnetwork_args = {json.dumps(words)}\n'
    recipe, report = make(lyco_toml=said + 'train_data_dir = "/nowhere"')
    options = {key: value for key, value in recipe.options.items() if not key.startswith("conv_")}
    assert (recipe.method, recipe.layers, options) == expected
    assert recipe.text_encoder == ("preset=unet-only" not in words)
    assert (f"network_args {lost}" in told(report)) == bool(lost)
    if recipe.method == "locon" and "conv_dim=2" in words:
        assert (recipe.options["conv_rank"], recipe.options["conv_alpha"]) == (2, 1.0)


@pytest.mark.usefixtures("kohya_folder")
def test_epochs_become_steps_where_the_pictures_can_be_counted(make: Make) -> None:
    head = 'network_module = "networks.lora"\ntrain_data_dir = "img"\nmax_train_epochs = 4\n'
    recipe, report = make(one_toml=head + "train_batch_size = 2\nsave_every_n_epochs = 2\nlr_warmup_steps = 0.25")
    assert (recipe.steps, recipe.adapter_every, recipe.warmup) == (4 * math.ceil(11 / 2), 2 * 6, 6)
    assert (recipe.images, recipe.trigger) == ("img", "")  # two folders: neither is the trigger
    recipe, report = make(two_toml=head.replace("img", "/nowhere"))
    assert "steps" in report.todos
    assert "4 epochs × images × repeats / batch 1" in report.todos["steps"]
    assert any("epochs" in line.key for line in report.dropped)


@pytest.mark.usefixtures("kohya_folder")
def test_class_images_are_among_the_batch_there_and_come_on_top_here(make: Make) -> None:
    head = 'network_module = "networks.lora"\ntrain_data_dir = "img"\nreg_data_dir = "reg"\nprior_loss_weight = 0.4\n'
    recipe, report = make(one_toml=head + "train_batch_size = 4\nmax_train_epochs = 2")
    prior = recipe.prior  # type: ignore[attr-defined]  # of style recipes
    assert (prior.weight, prior.folder, recipe.batch, recipe.steps) == (0.4, "reg", 2, 2 * math.ceil(22 / 4))
    recipe, report = make(two_toml=head + "train_batch_size = 1\ngradient_accumulation_steps = 6")
    assert (recipe.batch, recipe.accumulate) == (1, 3)
    recipe, report = make(three_toml=head + "train_batch_size = 3")
    assert recipe.batch == 3
    assert "twice as many" in told(report)["train_batch_size"]


DATA = """
[general]
caption_extension = ".txt"
shuffle_caption = true
enable_bucket = true
[[datasets]]
resolution = 768
batch_size = 5
  [[datasets.subsets]]
  image_dir = "img/3_sks dog"
  class_tokens = "sks dog"
  num_repeats = 7
  [[datasets.subsets]]
  image_dir = "img/1_sks cat"
  class_tokens = "sks cat"
"""


@pytest.mark.usefixtures("kohya_folder")
def test_a_dataset_config_given_beside_the_arguments(make: Make) -> None:
    lora = 'network_module = "networks.lora"\nmax_train_epochs = 3\nsave_every_n_epochs = 1\ntrain_batch_size = 1\n'
    recipe, _ = make(lora_toml=lora, data_toml=DATA)
    assert [(one.images, one.repeats, one.trigger, one.prompt) for one in recipe.concepts] == [
        ("img/3_sks dog", 7, "sks dog", "sks dog"),
        ("img/1_sks cat", 1, "sks cat", "sks cat"),
    ]
    assert (recipe.batch, recipe.resolution, recipe.tags.shuffle, recipe.captions.use) == (5, 768, True, True)
    assert (recipe.steps, recipe.buckets.use) == (3 * math.ceil((3 * 7 + 2) / 5), True)
    same, _ = make(lora_toml=lora + 'dataset_config = "data.toml"\n')  # or named by them
    assert same == recipe
    assert make(data_toml=DATA)[0].concepts == recipe.concepts  # or alone


def test_class_images_of_a_dataset_config(make: Make) -> None:
    reg = '[[datasets.subsets]]\nimage_dir = "reg/dogs"\nclass_tokens = "dog"\nis_reg = true\n'
    one = DATA[: DATA.rindex("  [[datasets.subsets]]")] + reg
    recipe, _ = make(lora_toml='network_module = "networks.lora"', data_toml=one)
    assert (recipe.task, recipe.images, recipe.repeats, recipe.prompt) == ("subject", "img/3_sks dog", 7, "sks dog")
    assert recipe.trigger == "sks"
    assert recipe.samples()[0] == "a sks dog"
    flipped = one.replace("num_repeats = 7", "num_repeats = 7\n  flip_aug = true")
    recipe, report = make(lora_toml='network_module = "networks.lora"', data_toml=flipped)
    assert recipe.flip  # of class images nothing is asked
    assert "flip_aug" not in told(report)
    assert recipe.class_text(None) == "dog"
    assert recipe.prior.folder == "reg/dogs"  # type: ignore[attr-defined]


def test_what_differs_between_subsets_is_said(make: Make) -> None:
    data = DATA.replace('class_tokens = "sks cat"', "flip_aug = true\ncaption_extention = 3")
    _, report = make(lora_toml='network_module = "networks.lora"', data_toml=data)
    assert "differs between the data sets" in told(report)["flip_aug"]
    assert "not a known key of data sets" in told(report)["caption_extention"]


def test_textual_inversion_and_full_training(make: Make) -> None:
    word = 'token_string = "<cat>"\ninit_word = "cat"\nnum_vectors_per_token = 4\nuse_object_template = true\n'
    recipe, _ = make(word_toml=word + 'learning_rate = 5e-4\ntrain_data_dir = "/nowhere"')
    assert (recipe.task, recipe.method, recipe.trigger) == ("concept", "textual-inversion", "<cat>")
    assert recipe.options == {"vectors": 4, "start": "cat", "keep_norm": False}
    assert (recipe.templates, recipe.captions.use, recipe.lr) == ("object", False, 5e-4)
    full = 'train_data_dir = "/nowhere"\nlearning_rate = 4e-6\nlearning_rate_te = 1e-6\n'
    recipe, report = make(full_toml=full + "stop_text_encoder_training = 200")
    assert (recipe.method, recipe.text_encoder, recipe.lr_scale) == ("full", True, {"text_encoder": 0.25})
    assert (recipe.text_encoder_stop, report.todos) == (200, {})
    _, report = make(db_toml='train_data_dir = "/nowhere"')
    assert "train_db.py" in report.todos["text_encoder"]


def test_sample_prompts_are_read_without_what_follows_them(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na sks dog --n bad --w 512\n\na sks dog, running\n", "utf-8")
    head = 'network_module = "networks.lora"\ntrain_data_dir = "/nowhere"\nsample_prompts = "prompts.txt"'
    recipe, report = make(one_toml=head)
    assert recipe.samples() == ["a sks dog", "a sks dog, running"]
    assert "--" in told(report)["sample_prompts"]
    _, report = make(two_toml=head.replace("prompts.txt", "gone.txt"))
    assert "cannot be read" not in told(report)["sample_prompts"]
    assert "list them" in told(report)["sample_prompts"]


def test_huber_and_weights_are_the_same_numbers_as_there(make: Make) -> None:
    """sd-scripts' own formulas, written out, against the losses that the recipes ask for."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    times, apart = torch.tensor([3, 420, 977]), torch.linspace(-2, 2, 3 * 2 * 5 * 4).view(3, 2, 5, 4).double()
    head = 'network_module = "networks.lora"\ntrain_data_dir = "/nowhere"\nloss_type = "huber"\nhuber_c = 0.3\n'
    signal = alphas[times]
    snr = signal / (1 - signal)
    thresholds = {
        "exponential": torch.exp(math.log(0.3) / 1000 * times),
        "snr": (1 - 0.3) / (1 + ((1 - signal) / signal) ** 0.5) ** 2 + 0.3,
        "constant": torch.full((3,), 0.3 * 2),
    }
    for schedule, c in thresholds.items():
        more = f'huber_schedule = "{schedule}"\n' + ("huber_scale = 2.0\n" if schedule == "constant" else "")
        recipe, _ = make(one_toml=head + more)
        ours = elementwise_loss(apart, torch.zeros_like(apart), times, Epsilon(alphas.float()), recipe.loss)
        c = c.view(-1, 1, 1, 1)
        torch.testing.assert_close(ours, 2 * c * ((apart**2 + c**2).sqrt() - c), rtol=1e-4, atol=1e-6)
    recipe, report = make(two_toml=head + 'huber_schedule = "exponential"\nhuber_scale = 2.0')
    assert "huber_scale" in told(report)
    recipe, _ = make(three_toml=head + "v_parameterization = true\nscale_v_pred_loss_like_noise_pred = true")
    torch.testing.assert_close(timestep_weights(times, V(alphas), recipe.loss).double(), snr / (snr + 1))


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        ("clip_skip = 2", "clip_skip", "last layer"),
        ('loss_type = "l1"', "loss_type", "only l2 and huber are supported"),
        ('loss_type = "smooth_l1"', "loss_type", "times delta"),
        ('optimizer_type = "DAdaptAdam"', "optimizer_type", "prodigy, which finds the learning"),
        ('optimizer_type = "SGDNesterov"', "optimizer_type", "adamw"),
        ('optimizer_type = "AdaFactor"', "optimizer_args relative_step", "fixed at false in optimizer=adafactor"),
        (
            'optimizer_type = "Prodigy"\noptimizer_args = ["d_coef=2"]',
            "optimizer_args d_coef",
            "fixed at 1.0 in optimizer=prodigy",
        ),
        ('lr_scheduler = "inverse_sqrt"', "lr_scheduler", "replaced by constant"),
        ('lr_scheduler_type = "CosineAnnealingLR"', "lr_scheduler_type", "set lr_schedule"),
        (
            "noise_offset = 0.1\nnoise_offset_random_strength = true",
            "noise_offset_random_strength",
            "always the given one",
        ),
        ('resolution = "512,768"', "resolution", "one side"),
        ("full_bf16 = true", "full_bf16", "float32"),
        ('in_json = "meta.json"', "in_json", "metadata.jsonl"),
        ('network_args = ["block_dims=1,2"]', "network_args block_dims", "options.ranks.IN04"),
        ('network_args = ["spread=1"]', "network_args spread", "not a known network argument"),
        ("color_aug = true", "color_aug", "augmentation is not supported"),
        ('masked_loss = true\nconditioning_data_dir = "masks"', "conditioning_data_dir", "NAME_mask.png"),
        ("seed = 4294967296", "seed", "between 0 and 2147483647"),
        ("netwrok_dim = 4", "netwrok_dim", "did you mean 'network_dim'"),
        ('dataset_config = "gone.toml"', "dataset_config", "give it on the command line as well"),
        ('huggingface_token = "hf_1"', "huggingface_token", "uploads are not supported"),
    ],
)
def test_what_has_no_counterpart_is_told_with_its_value(make: Make, more: str, key: str, said: str) -> None:
    head = 'network_module = "networks.lora"\ntrain_data_dir = "/nowhere"\ncaption_extension = ".txt"\n'
    _, report = make(one_toml=head + more)
    assert said in told(report)[key]
    shown = "\n".join(line for _, lines in report.sections() for line in lines)
    assert f"{key} = " in shown
    assert "hf_1" not in shown


GUI: dict[str, Any] = {
    **{"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "full", "pretrained_model_name_or_path": "sd15.safetensors"},
    **{"network_dim": "8", "network_alpha": 4, "conv_dim": 2, "conv_alpha": 1, "use_tucker": True, "factor": -1},
    **{"max_resolution": "512,512", "train_data_dir": "img", "reg_data_dir": "", "caption_extension": ".txt"},
    **{"learning_rate": 1e-4, "unet_lr": 0.0004, "text_encoder_lr": 0.0001, "optimizer": "AdamW8bit"},
    **{"optimizer_args": '"weight_decay=0.1"', "lr_scheduler": "cosine", "lr_warmup": 10, "lr_warmup_steps": 0},
    **{"epoch": 5, "max_train_steps": "", "max_train_epochs": "", "train_batch_size": "2", "seed": "1234"},
    **{"noise_offset_type": "Multires", "noise_offset": 0.05, "multires_noise_iterations": 8},
    **{"multires_noise_discount": 0.2, "min_snr_gamma": 0, "xformers": "xformers", "max_token_length": "75"},
    **{"sample_prompts": "a sks dog\na sks cat --w 512", "sample_every_n_steps": 0, "flux1_checkbox": False},
    **{"additional_parameters": "--min_timestep 100 --huber_c=0.2", "no_such_key": 3, "clip_skip": "1"},
}


@pytest.mark.usefixtures("kohya_folder")
def test_a_configuration_of_the_gui(make: Make) -> None:
    recipe, report = make(gui_json=GUI)
    assert (recipe.method, recipe.rank, recipe.alpha_or_rank()) == ("loha", 8, 4)
    assert recipe.options == {"conv_rank": 2, "tucker": True}
    assert (recipe.lr, recipe.lr_scale, recipe.weight_decay) == (4e-4, {"text_encoder": 0.25}, 0.1)
    assert (recipe.steps, recipe.warmup, recipe.seed) == (math.ceil(11 / 2 * 5), 2, 1234)  # the GUI rounds once
    assert (recipe.noise.offset, recipe.noise.pyramid, recipe.loss.snr_gamma) == (0, 0.2, None)
    assert (recipe.timesteps.min, recipe.sample_prompts) == (100, ["a sks dog", "a sks cat"])
    assert "not a known key of kohya_ss" in told(report)["no_such_key"]
    lines = {line.key: str(line) for _, line in report.mapped}
    assert lines["LoRA_type"].startswith("LoRA_type = LyCORIS/LoHa → method: loha")
    assert lines["lr_warmup"].startswith("lr_warmup = 10 → warmup: 2")
    spoken = {*lines, *told(report), *report.defaulted_keys(), "optimizer_args"}  # whose parts are told of
    assert set(GUI) <= spoken  # nothing is dropped in silence


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"text_encoder_lr": 0}, {"text_encoder": False, "lr_scale": {}}),
        ({"unet_lr": 0}, {"text_encoder": True, "lr_scale": {"unet": 0.0}, "lr": 1e-4}),
        ({"unet_lr": 0, "text_encoder_lr": 0}, {"text_encoder": True, "lr_scale": {}, "lr": 1e-4}),
        ({"LoRA_type": "Standard"}, {"method": "lora", "layers": "attention+feedforward", "options": {}}),
        ({"LoRA_type": "Kohya LoCon"}, {"method": "locon", "layers": "all"}),
        ({"LoRA_type": "LyCORIS/LoKr", "factor": 4}, {"method": "lokr", "options": {"factor": 4, "tucker": True}}),
        ({"noise_offset_type": "Original"}, {"noise": {"offset": 0.05, "pyramid": 0.0, "perturbation": 0.0}}),
        ({"max_train_steps": 70, "lr_warmup_steps": 12}, {"steps": 70, "warmup": 12}),
        ({"seed": 0}, {"seed": 0}),
    ],
)
@pytest.mark.usefixtures("kohya_folder")
def test_the_gui_has_ways_of_its_own(make: Make, changed: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe, _ = make(gui_json={**GUI, **changed})
    assert {key: recipe.model_dump()[key] for key in expected} == expected


@pytest.mark.usefixtures("kohya_folder")
def test_other_tabs_of_the_gui(make: Make) -> None:
    common = {key: GUI[key] for key in ("max_resolution", "train_data_dir", "learning_rate", "epoch", "optimizer")}
    rates = {"learning_rate_te": 5e-5, "learning_rate_te1": 1e-6, "learning_rate_te2": 1e-6, "sdxl": False}
    recipe, _ = make(db_json={**common, **rates, "stop_text_encoder_training": 0})
    assert (recipe.method, recipe.text_encoder, recipe.lr_scale) == ("full", True, {"text_encoder": 0.5})
    recipe, _ = make(db_json={**common, **rates, "learning_rate_te": 0})
    assert (recipe.method, recipe.text_encoder) == ("full", False)
    word = {"token_string": "zxc", "init_word": "cat", "num_vectors_per_token": 3, "template": "style template"}
    recipe, report = make(ti_json={**common, **word, "caption_dropout_rate": 0.05, "weights": ""})
    assert (recipe.task, recipe.trigger, recipe.templates, recipe.caption_dropout) == ("concept", "zxc", "style", 0)
    tuned = {"image_folder": "img/3_sks dog", "train_dir": ".", "caption_metadata_filename": "meta.json"}
    recipe, report = make(ft_json={**common, **tuned, "dataset_repeats": "9", "train_text_encoder": True})
    assert (recipe.images, recipe.repeats, recipe.text_encoder) == ("img/3_sks dog", 9, True)
    assert "metadata.jsonl" in told(report)["caption_metadata_filename"]


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("a.toml", "a = [", "cannot be read as TOML"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.yaml", "a: [1, 2\nb: 3\n", r"cannot be read as YAML \(line 2, column 2\): expected ',' or ']', but got"),
        ("a.json", "3", "but a configuration needs keys and values"),
        ("a.ini", "a: 3", "is not a configuration, whose name"),
        ("a.toml", "some = 3", "not a known configuration of sd-scripts"),
        ("a.toml", 'network_module = "networks.lora_lumina"', "only Stable Diffusion 1.x, 2.x, 3"),
        (
            "a.toml",
            'network_module = "networks.lora"\nnetwork_dim = "big"',
            "Invalid value network_dim='big' .* must be a number",
        ),
        ("a.toml", 'network_module = "networks.lora"\nnetwork_dim = 2.5', "must be an integer"),
        ("a.toml", 'network_module = "networks.lora"\nnetwork_args = ["x"]', "is not of the form key=value"),
        ("a.json", '{"LoRA_type": "Flux1", "max_resolution": "512"}', "LoRA_type='Flux1' is not a known network type"),
        ("a.json", '{"LoRA_type": "Standard", "sd3_checkbox": true}', "This configuration has sd3_checkbox"),
        ("a.toml", "[[datasets]]\nsubsets = 3", r"needs \[\[datasets.subsets\]\] under"),
        ("a.toml", "[general]\nflip_aug = true", r"needs \[\[datasets\]\] with"),
    ],
)
def test_files_that_will_not_do_are_answered(tmp_path: Path, name: str, content: str, answer: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(DiffgraftError, match=answer):
        convert_config([tmp_path / name])


def test_files_that_do_not_go_together_are_answered(tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="There is no file"):
        convert_config([tmp_path / "none.toml"])
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text("network_dim = 3", "utf-8")
    with pytest.raises(DiffgraftError, match="give one of each"):
        convert_config([tmp_path / "a.toml", tmp_path / "b.toml"])
    (tmp_path / "c.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(DiffgraftError, match="UTF-8"):
        convert_config([tmp_path / "c.toml"])


@pytest.mark.parametrize(
    ("more", "use", "lines"),
    [
        ('caption_extension = ".txt"', True, "first"),
        ('caption_extension = ".caption"', True, "first"),
        ('caption_extension = ".tags"', False, "first"),
        ('caption_extension = ".tags"\nenable_wildcard = true', False, "random"),
        ("enable_wildcard = true", True, "random"),
    ],
)
def test_captions_are_read_as_there(make: Make, more: str, use: bool, lines: str) -> None:
    recipe, _ = make(a_toml=f'network_module = "networks.lora"\ntrain_data_dir = "/nowhere"\n{more}')
    assert (recipe.captions.use, recipe.captions.lines) == (use, lines)
