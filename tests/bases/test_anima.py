"""Anima: its modular folder, its files with all that trainers and ComfyUI have in them, and the frozen conditioner."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaModularPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.registry import read_delta
from diffgraft.bases import Base, load_base
from diffgraft.bases.checkpoint_files import is_checkpoint
from diffgraft.bases.modular import MODULAR_INDEX
from diffgraft.bases.original_weights import original_state_dict
from diffgraft.bases.registry import families
from diffgraft.bases.transformer_files import open_transformer
from diffgraft.errors import DiffgraftError
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from tests.conftest import flow_folder_of
from tests.recipes import SUBJECT
from tests.trainers.test_flow_training import settings

COMFYUI_TEXT = "text_encoders.qwen3_06b.transformer.model."
KOHYA_ENDS = ("lora_down.weight", "lora_up.weight")


@pytest.fixture(scope="module")
def anima(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(flow_folder_of("anima", tmp_path_factory))


def published(base: Base, prefix: str = "net.") -> dict[str, Tensor]:
    """The weights of a base as the model's authors publish them: transformer and conditioner behind one prefix."""
    layout = families()["anima"].original
    assert layout is not None
    state = original_state_dict(layout, base.denoiser.state_dict())
    state |= {
        f"llm_adapter.{name}": value for name, value in base.prompt_networks()["text_conditioner"].state_dict().items()
    }
    return {f"{prefix}{name}": value.clone() for name, value in state.items()}


def copied(base: Base, folder: Path) -> Path:
    return Path(shutil.copytree(base.name, folder))


def changed_index(folder: Path, **entries: Any) -> None:
    path = folder / MODULAR_INDEX
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), "utf-8")


def test_the_conditioner_is_a_part_of_the_base_and_of_its_hash(anima: Base, tmp_path: Path) -> None:
    folder = copied(anima, tmp_path / "folder")
    assert is_checkpoint(folder)
    file = folder / "text_conditioner" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "norm.weight": state["norm.weight"] + 1}, file)
    other = load_base(folder)
    assert other.hash != anima.hash
    states = [base.condition(["a cat"]).hidden_states for base in (anima, other)]
    assert states[0].shape == (1, 512, 24)
    assert not torch.equal(*states)


def test_states_depend_on_both_tokenizers_and_not_on_the_rest_of_the_batch(anima: Base) -> None:
    prompts = ["a cat", "", "a large dog in the snow " * 40]
    together = anima.condition(prompts).hidden_states
    for prompt, states in zip(prompts, together, strict=True):
        torch.testing.assert_close(anima.condition([prompt]).hidden_states[0], states, rtol=1e-4, atol=1e-5)
        kept = min(512, len(anima.tokenizers()["t5_tokenizer"](prompt).input_ids))
        assert states.isfinite().all()
        assert states[:kept].any(1).all()
        assert not states[kept:].any()


@pytest.mark.parametrize("prefix", ["net.", "", "model.diffusion_model.", "diffusion_model."])
def test_files_hold_the_conditioner_beside_the_transformer(prefix: str, anima: Base, tmp_path: Path) -> None:
    """Those of Cosmos also have tensors that change nothing."""
    state = published(anima, prefix)
    state |= {f"{prefix}{name}": torch.ones(3) for name in ("pos_embedder.seq", "t_embedding_norm._extra_state")}
    save_file(state, tmp_path / "model.safetensors")
    with open_transformer(tmp_path / "model.safetensors") as file:
        assert file is not None
        assert file.places.keys() == anima.denoiser.state_dict().keys()
    bare = copied(anima, tmp_path / "bare")
    shutil.rmtree(bare / "transformer")
    (bare / "text_conditioner" / "diffusion_pytorch_model.safetensors").unlink()
    base = load_base(tmp_path / "model.safetensors", components=bare)
    assert base.hash == anima.hash
    assert base.denoiser.config.rope_scale == [1.0, 4.0, 4.0]
    noisy = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (own.denoise(noisy, torch.tensor([500]), own.condition(["a cat"])) for own in (base, anima))
    assert torch.equal(ours, theirs)


def test_a_file_without_the_conditioner_takes_that_of_the_components(anima: Base, tmp_path: Path) -> None:
    state = {name: value for name, value in published(anima).items() if "llm_adapter" not in name}
    save_file(state, tmp_path / "model.safetensors")
    assert load_base(tmp_path / "model.safetensors", components=anima.name).hash == anima.hash


def test_a_damaged_conditioner_in_a_file_is_refused(anima: Base, tmp_path: Path) -> None:
    state = published(anima)
    for damage, why in (
        ({"net.llm_adapter.norm.weight": None}, "without 1 of the weights of a text_conditioner, such as norm.weight"),
        ({"net.llm_adapter.norm.weight": torch.ones(5)}, r"norm.weight of shape \[5\]"),
        ({"net.llm_adapter.other": torch.ones(5)}, "other, which the text_conditioner of the components does not have"),
        ({"net.blocks.0.self_attn.k_proj.weight": None}, "blocks.0.self_attn.k_proj.weight"),
    ):
        own = {name: value for name, value in {**state, **damage}.items() if value is not None}
        save_file(own, tmp_path / "model.safetensors")
        with pytest.raises(DiffgraftError, match=why):
            load_base(tmp_path / "model.safetensors", components=anima.name)


def test_what_merge_writes_is_read_here_and_by_diffusers(anima: Base, tmp_path: Path) -> None:
    """A file for ComfyUI, which knows Anima by the conditioner in it, and a modular folder."""
    file = merge_checkpoint(anima, {}, tmp_path / "model.safetensors")
    written = load_file(file)
    assert written.keys() == published(anima, "").keys()
    assert all(torch.equal(value, written[name]) for name, value in published(anima, "").items())
    folder = merge_checkpoint(anima, {}, tmp_path / "folder")
    assert load_base(folder).hash == anima.hash
    moved = folder.rename(tmp_path / "moved")
    pipe = AnimaModularPipeline.from_pretrained(str(moved))
    pipe.load_components()
    theirs = pipe.transformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in anima.denoiser.state_dict().items())
    assert type(pipe.t5_tokenizer) is type(anima.tokenizers()["t5_tokenizer"])


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel", {}]}, "supported classes of diffusers: Cosmos"),
        ({"text_conditioner": ["someones_code", "AnimaTextConditioner", {}]}, "as its text_conditioner; supported"),
        ({"text_conditioner": ["diffusers", "AnimaTextConditioner"]}, "as its text_conditioner; supported"),
        ({"t5_tokenizer": [None, None, {}]}, "as its t5_tokenizer; supported classes of transformers: T5Tokenizer"),
        ({"upscaler": ["diffusers", "UNet2DModel", {}]}, "lists a part 'upscaler'"),
        ({"_class_name": "SomeModularPipeline"}, "holds a SomeModularPipeline, which is not supported"),
    ],
    ids=str,
)
def test_an_index_that_names_something_else_is_refused(
    entry: dict[str, Any], why: str, anima: Base, tmp_path: Path
) -> None:
    changed_index(copied(anima, tmp_path / "folder"), **entry)
    with pytest.raises(DiffgraftError, match=why):
        load_base(tmp_path / "folder")


def test_parts_are_those_of_the_folder_wherever_the_index_says_they_are(anima: Base, tmp_path: Path) -> None:
    folder = copied(anima, tmp_path / "folder")
    place = {"pretrained_model_name_or_path": "someone/else", "subfolder": "../../elsewhere"}
    changed_index(folder, vae=["diffusers", "AutoencoderKLQwenImage", place], _blocks_class_name="SomeBlocks")
    changed_index(folder, guider=["diffusers", "ClassifierFreeGuidance", {}])
    assert load_base(folder).vae_hash == anima.vae_hash
    shutil.rmtree(folder / "t5_tokenizer")
    changed_index(folder, t5_tokenizer=["transformers", "T5TokenizerFast", place])
    with pytest.raises(
        DiffgraftError, match=r"t5_tokenizer is missing\. The index of the folder has it from 'someone/els"
    ):
        load_base(folder)


@pytest.mark.parametrize(
    ("file", "key", "value", "why"),
    [
        ("transformer", "patch_size", [2, 2, 2], "one frame of 2 × 2 latents"),
        ("transformer", "extra_pos_embed_type", "learnable", "extra_pos_embed_type='learnable', which is not supp"),
        ("transformer", "num_layers", 10**6, "num_layers=1000000"),
        ("transformer", "rope_scale", [1.0, 4.0], "rope_scale"),
        ("text_conditioner", "min_sequence_length", 77, "min_sequence_length=77"),
        ("text_conditioner", "num_layers", 10**6, "num_layers=1000000"),
        ("text_conditioner", "target_vocab_size", 4, "text_conditioner"),
    ],
)
def test_configurations_of_other_models_are_refused(
    file: str, key: str, value: object, why: str, anima: Base, tmp_path: Path
) -> None:
    path = copied(anima, tmp_path / "folder") / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), key: value}), "utf-8")
    with pytest.raises(DiffgraftError, match=why):
        load_base(tmp_path / "folder")


def test_a_tokenizer_beyond_the_table_of_the_conditioner_is_refused(anima: Base, tmp_path: Path) -> None:
    folder = copied(anima, tmp_path / "folder")
    config, weights = (
        folder / "text_conditioner" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "target_vocab_size": 4}), "utf-8")
    state = load_file(weights)
    save_file({**state, "embed.weight": state["embed.weight"][:4].clone()}, weights)
    with pytest.raises(DiffgraftError, match="tokens beyond the 4 of the text encoder"):
        load_base(folder)


@pytest.mark.parametrize("method", ["lora", "full", "pivotal"])
def test_training_the_text_encoder_leaves_the_conditioner_as_it_was(
    method: str, anima: Base, pictures: Path, tmp_path: Path
) -> None:
    """Gradients flow through it to Qwen3, and none of its weights is trained."""
    network = anima.prompt_networks()["text_conditioner"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    more = {} if method == "pivotal" else {"text_encoder": True}
    run = dg.train(SUBJECT, base=anima, images=pictures, output=tmp_path / "run", **settings(method, **more))
    assert any(path.startswith("text_encoder.") for path in run.adapter.modules) or run.adapter.tokens
    assert not any("text_conditioner" in path for path in run.adapter.modules)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(value.requires_grad for value in network.parameters())


def test_adapters_have_the_names_of_sd_scripts_and_of_comfyui(tmp_path: Path) -> None:
    """Those of sd-scripts' `networks/lora_anima.py`, and those that its converter for ComfyUI makes of them."""
    paths = {
        "transformer.transformer_blocks.0.attn1.to_q": "blocks.0.self_attn.q_proj",
        "transformer.transformer_blocks.1.attn2.to_out.0": "blocks.1.cross_attn.output_proj",
        "transformer.transformer_blocks.1.ff.net.0.proj": "blocks.1.mlp.layer1",
        "transformer.transformer_blocks.1.norm2.linear_1": "blocks.1.adaln_modulation_cross_attn.1",
        "text_encoder.layers.0.self_attn.q_proj": "layers.0.self_attn.q_proj",
    }
    leaves = {"lora_down": torch.ones(2, 6), "lora_up": torch.ones(8, 2)}
    deltas = {path: (read_delta("lora", leaves, 2.0),) for path in paths}
    adapter = Adapter(deltas, {"method": "lora", "base": {"family": "anima"}})
    starts = {"transformer": ("lora_unet_", "diffusion_model."), "text_encoder": ("lora_te_", COMFYUI_TEXT)}
    kohya, comfyui = set(), set()
    for path, theirs in paths.items():
        with_underscores, with_dots = starts[path.partition(".")[0]]
        kohya |= {f"{with_underscores}{theirs.replace('.', '_')}.{end}" for end in ("alpha", *KOHYA_ENDS)}
        comfyui |= {f"{with_dots}{theirs}.{end}" for end in ("lora_A.weight", "lora_B.weight")}
    for dialect, keys in (("kohya", kohya), ("comfyui", comfyui)):
        file = adapter.save(tmp_path / f"{dialect}.safetensors", dialect)
        assert load_file(file).keys() == keys
        assert dg.load_adapter(file).deltas.keys() == paths.keys()
    bare = load_file(tmp_path / "kohya.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")  # without the header
    assert dg.load_adapter(tmp_path / "bare.safetensors").metadata["base"]["family"] == "anima"


@pytest.mark.parametrize("start", ["lora_unet_llm_adapter_blocks_0_self_attn_q_proj", "llm_adapter.blocks.0.mlp.2"])
def test_adapters_of_the_conditioner_are_refused_by_name(start: str, tmp_path: Path) -> None:
    """sd-scripts writes them with `train_llm_adapter=True`."""
    own = "lora_unet_blocks_0_self_attn_q_proj" if "_unet_" in start else "diffusion_model.blocks.0.self_attn.q_proj"
    start = start if "_unet_" in start else f"diffusion_model.{start}"
    state = {f"{name}.{end}": torch.ones(4, 4) for name in (own, start) for end in KOHYA_ENDS}
    save_file(state, tmp_path / "theirs.safetensors")
    with pytest.raises(DiffgraftError, match="a layer of the text_conditioner of anima, which stays frozen here"):
        dg.load_adapter(tmp_path / "theirs.safetensors")
