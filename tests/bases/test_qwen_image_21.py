"""Qwen-Image 2.1: prompts of any length, its processor without torchvision, and pictures with an alpha channel."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Pipeline
from safetensors.torch import load_file, save_file

from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import base_of
from diffgraft.bases.meta_base import meta_base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.rng import normal
from tests.conftest import flow_folder_of


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(flow_folder_of("qwen-image-21", tmp_path_factory))


def test_the_states_are_those_of_the_pipeline_whatever_the_batch(qwen: Base) -> None:
    """Those of an empty prompt too, which the pipeline reads as a space."""
    prompts = ["a cat", "", "a large dog in the snow"]
    together = qwen.condition(prompts)
    for place, prompt in enumerate(prompts):
        theirs, _, _ = qwen.pipeline().encode_prompt(prompt)
        mask = together.added["mask"][place]
        torch.testing.assert_close(together.hidden_states[place][mask], theirs[0], rtol=1e-4, atol=1e-5)
        assert not together.hidden_states[place][~mask].any()


def test_a_long_prompt_keeps_the_end_of_its_template(qwen: Base) -> None:
    """Two that differ only in what does not fit are the same, and the model still sees where the answer begins."""
    seen: list[torch.Tensor] = []
    hook = qwen.text_encoder.model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    try:
        first, second = (qwen.condition(["a cat " * 200 + end]) for end in ("", " and a dog"))
    finally:
        hook.remove()
    assert first.hidden_states.shape == (1, 512, 32)
    assert first.added["mask"].all()
    assert torch.equal(first.hidden_states, second.hidden_states)
    end = qwen.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids
    assert seen[0][0, -len(end) :].tolist() == end


@pytest.mark.parametrize("is_distributed", [False, True])
def test_the_transformer_runs_once_for_each_length(
    is_distributed: bool, qwen: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other processes it runs once for each prompt, as the shards of all of them have to run equally often."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: is_distributed)
    prompts = ["a cat", "a large dog", "a dog", "a red cat"]
    noisy, timesteps = normal((4, 4, 2, 4), 1), torch.tensor([10, 300, 700, 990])
    sizes: list[int] = []
    hook = qwen.denoiser.register_forward_pre_hook(
        lambda _, __, named: sizes.append(len(named["hidden_states"])), with_kwargs=True
    )
    with torch.no_grad():
        together = qwen.denoise(noisy, timesteps, qwen.condition(prompts))
        hook.remove()
        alone = [qwen.denoise(noisy[n : n + 1], timesteps[n : n + 1], qwen.condition([prompts[n]])) for n in range(4)]
    assert sizes == ([1] * 4 if is_distributed else [2, 1, 1])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_what_merge_writes_is_read_here_and_by_diffusers(qwen: Base, tmp_path: Path) -> None:
    """The processor's files for pictures are passed on, and the index names the class that diffusers has for it."""
    source = Path(shutil.copytree(qwen.name, tmp_path / "source"))
    (source / "processor" / "preprocessor_config.json").write_text('{"patch_size": 16}', "utf-8")
    base = load_base(source)
    folder = merge_checkpoint(base, {}, tmp_path / "folder")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    assert (folder / "processor" / "preprocessor_config.json").read_text("utf-8") == '{"patch_size": 16}'
    assert load_base(folder).hash == qwen.hash
    pipe = QwenImage21Pipeline.from_pretrained(folder, processor=base.pipeline().processor)
    theirs = pipe.transformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in qwen.denoiser.state_dict().items())
    again = base_of(pipe)
    assert again.hash == qwen.hash
    assert again.tokenizer is pipe.processor.tokenizer
    file = merge_checkpoint(base, {}, tmp_path / "model.safetensors")
    assert "transformer_blocks.1.img_mlp.gate_up.weight" in load_file(file)
    assert load_base(file, components=folder).hash == qwen.hash


def test_files_with_one_or_two_layers_for_the_gate_are_the_same(qwen: Base, tmp_path: Path) -> None:
    """ComfyUI has the gate above the other half, and the names of diffusers have them apart; a file has one of both."""
    fused = load_file(merge_checkpoint(qwen, {}, tmp_path / "fused.safetensors"))
    gate = qwen.denoiser.transformer_blocks[0].img_mlp.gate_layer.weight
    assert torch.equal(fused["transformer_blocks.0.img_mlp.gate_up.weight"][: len(gate)], gate)
    plain = {name: value.clone() for name, value in qwen.denoiser.state_dict().items()}
    save_file({f"model.diffusion_model.{name}": value for name, value in plain.items()}, tmp_path / "plain.safetensors")
    assert load_base(tmp_path / "plain.safetensors", components=qwen.name).hash == qwen.hash
    save_file({**fused, **plain}, tmp_path / "both.safetensors")
    with pytest.raises(DiffgraftError, match=r"hold transformer_blocks\.0\.img_mlp"):
        load_base(tmp_path / "both.safetensors", components=qwen.name)


def test_noise_levels_that_an_author_set_are_no_part_of_the_folder(qwen: Base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen.name, tmp_path / "folder"))
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.6, 0.2]}), "utf-8")
    assert load_base(folder).hash == qwen.hash


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "in_channels", 3),
        ("vae", "patch_size", 2),
        ("vae", "z_dim", 10**6),
        ("transformer", "num_layers", 10**6),
        ("transformer", "context_in_dim", 10**6),
    ],
)
def test_configurations_of_other_models_are_refused(
    part: str, key: str, value: int, qwen: Base, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(qwen.name, tmp_path / "folder")) / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), key: value}), "utf-8")
    with pytest.raises(DiffgraftError, match=f"{key}={value}"):
        load_base(tmp_path / "folder")


def test_shifts_count_latents_as_the_pipeline_does(qwen: Base) -> None:
    """μ of a picture of 1024 pixels, which has 64 · 64 latents: the line from 0.5 at 256 to 0.9 at 8192."""
    mu = 0.5 + 0.4 / (8192 - 256) * (64 * 64 - 256)
    assert qwen.family.timestep_shift(qwen, 64, 64) == pytest.approx(torch.tensor(mu).exp().item())
    scheduler: Any = type(qwen.scheduler).from_config(qwen.scheduler.config)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
    levels = qwen.family.sampling_sigmas(qwen, 32 * 32, 2)
    sigma = scheduler.sigmas[1].double()
    assert levels is not None
    assert levels[1] == pytest.approx(float(sigma / (1 - sigma)), rel=1e-5)


def test_shapes_on_meta_are_those_of_the_real_base(qwen: Base) -> None:
    """A transformer that looks for the picture's tokens runs without values, forwards and backwards."""
    base = meta_base(qwen.name)
    noisy = torch.empty(2, 4, 2, 4, device="meta", requires_grad=True)
    base.denoiser.enable_gradient_checkpointing()
    base.denoiser.train()
    told = base.condition(["a cat", "a large dog"])
    found = base.denoise(noisy, torch.zeros(2, dtype=torch.long, device="meta"), told)
    found.square().mean().backward()
    assert found.shape == noisy.shape
    assert noisy.grad is not None


def test_parts_of_the_text_encoder_that_cannot_matter_are_known(qwen: Base) -> None:
    """By gradients: its final norm, what reads pictures and what writes text have none."""
    encoder = qwen.text_encoder.requires_grad_(True)
    named = dict(encoder.named_parameters())
    try:
        states = qwen.condition(["a cat"]).hidden_states
        found = torch.autograd.grad(states.square().sum(), list(named.values()), allow_unused=True)
    finally:
        encoder.requires_grad_(False)
    moved = {name for name, own in zip(named, found, strict=True) if own is not None and own.any()}
    affects = {name for name in named if qwen.family.affects_output(qwen, "text_encoder", name.rpartition(".")[0])}
    assert moved == affects
    assert "model.language_model.norm.weight" in named.keys() - moved
