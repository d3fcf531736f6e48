"""Loading a base: by name, folder, file; and a sentence where that fails."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffgraft.bases import Base, load_base, loading, prediction
from diffgraft.bases.ldm_keys import ldm_state_dict
from diffgraft.bases.tokens import token_ids
from diffgraft.bases.unet import unet_arguments
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_safetensors
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.trainers.denoiser import forward_process
from tests.conftest import UNETS


def test_the_embedded_base_is_frozen_and_whole(base: Base) -> None:
    assert base.family.name == "sd1"
    assert (base.resolution, base.vae_scale_factor) == (64, 4)
    assert base.unet.dtype == torch.float32
    for _, part in base.parts():
        assert not part.training
        assert not any(value.requires_grad for value in part.parameters())
    assert len(base.tokenizer) == 49408
    assert base.tokenizer.tokenize("a sks dog") == ["a</w>", "sks</w>", "dog</w>"]


def test_a_folder_gives_the_same_base(base: Base, tmp_path: Path) -> None:
    base.pipeline().save_pretrained(tmp_path / "copy")
    again = load_base(tmp_path / "copy")
    assert again.hash == base.hash
    assert again.name == str(tmp_path / "copy")


def test_a_folder_of_half_precision_alone(base: Base, tmp_path: Path) -> None:
    load_base("tiny", torch.float16).pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    names = {path.name for path in (tmp_path / "half" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert load_base(tmp_path / "half").hash == base.hash
    with open_weights(tmp_path / "half") as weights, open_weights("tiny") as whole:
        assert set(weights) == set(whole)
        assert weights["unet.conv_in.weight"].dtype == torch.float16


def test_the_hash_is_of_content_and_not_of_precision(base: Base) -> None:
    assert load_base("tiny", torch.float16).hash == base.hash
    assert load_base("tiny", torch.bfloat16).hash == base.hash
    other = load_base("tiny")
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 0.5
    assert replace(other).hash != base.hash
    other = load_base("tiny")
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 0.5
    assert replace(other).hash == base.hash


def test_conditioning_is_what_the_pipeline_computes(base: Base, sdxl_folder: Path) -> None:
    for held in (base, load_base(sdxl_folder)):
        pipe = held.pipeline()
        found = held.condition(["a dog in the snow", "a cat"], (48, 32))
        encoded = pipe.encode_prompt(
            ["a dog in the snow", "a cat"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        torch.testing.assert_close(found.hidden_states, encoded[0])
        if held.family.name == "sdxl":
            torch.testing.assert_close(found.added["text_embeds"], encoded[2])
            assert found.added["time_ids"].tolist() == [[48, 32, 0, 0, 48, 32]] * 2


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_gives_the_same_base(
    family: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_base(folders / family)
    spread = torch.zeros(8)
    if family == "sd2":  # as those have it that predict v
        spread = wanted.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
        torch.nn.init.normal_(spread, std=0.2, generator=torch.Generator().manual_seed(0))
        wanted = replace(wanted)
    write_safetensors(tmp_path / "model.safetensors", ldm_state_dict(wanted), {})
    monkeypatch.setattr(loading, "CONFIGS", folders)
    found = load_base(tmp_path / "model.safetensors")
    assert found.family.name == wanted.family.name == family
    assert found.hash == wanted.hash
    for name, value in wanted.vae.state_dict().items():
        assert torch.equal(found.vae.state_dict()[name], value), name
    assert found.scheduler.config.beta_end == 0.012
    assert found.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    if family == "sd2":
        write_safetensors(
            tmp_path / "512.safetensors",
            {**ldm_state_dict(wanted), prediction._BIAS: torch.zeros_like(spread)},
            {},
        )
        assert load_base(tmp_path / "512.safetensors").prediction_type == "epsilon"
    prompts = ["a dog in the snow", "a cat"]
    for name in ("tokenizer", "tokenizer_2"):
        if tokenizer := getattr(wanted, name):
            assert torch.equal(token_ids(getattr(found, name), prompts), token_ids(tokenizer, prompts))


def test_every_weight_of_a_single_file_is_accounted_for(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader would draw what is missing at random, and drop what is left over."""
    whole = ldm_state_dict(load_base(folders / "sd1"))
    monkeypatch.setattr(loading, "CONFIGS", folders)
    for part in ("cond_stage_model.", "model.diffusion_model."):
        names = sorted(name for name in whole if name.startswith(part) and name.endswith(".weight"))
        first, last, half = names[0], names[-1], set(names[len(names) // 2 :])
        for weights, said in (
            ({name: value for name, value in whole.items() if name not in half}, f"it lacks {len(half)} of its"),
            ({**whole, last: torch.zeros(3, 5, 7)}, f"{last} has the shape [3, 5, 7]"),
            ({**whole, first: torch.zeros(whole[first].shape, dtype=torch.int64)}, f"{first} is I64"),
        ):
            write_safetensors(tmp_path / "model.safetensors", weights, {})
            assert said in answer(tmp_path / "model.safetensors")
    more = "model.diffusion_model.input_blocks.99.0.weight"
    write_safetensors(tmp_path / "model.safetensors", {**whole, more: torch.zeros(2, 3)}, {})
    assert f"{more} belongs to a UNet of another configuration" in answer(tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_is_predicted_is_stated_and_can_be_overridden(family: str, folders: Path, tmp_path: Path) -> None:
    """A base that predicts v on a schedule that ends in pure noise, written as one file, and read again."""
    held = load_base(folders / family, prediction_type="v_prediction", zero_snr=True)
    assert "predicts v_prediction, zero terminal SNR" in repr(held)
    assert (held.prediction_type, held.zero_snr) == ("v_prediction", True)
    assert held.scheduler.config.timestep_spacing == "trailing"
    process = forward_process(held)
    x, noise = torch.ones(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    noisy, target, _ = process.at_timesteps(x, noise, torch.tensor([999]))
    torch.testing.assert_close(noisy, noise, atol=1e-4, rtol=0)
    torch.testing.assert_close(target, -x, atol=1e-4, rtol=0)
    file = merge_checkpoint(held, {}, tmp_path / "model.safetensors")
    again = load_base(file)
    assert again.prediction_type == "v_prediction"
    assert again.zero_snr  # which XL files have a tensor for, and others the header alone
    assert again.hash == held.hash
    assert load_base(file, prediction_type="epsilon", zero_snr=False).prediction_type == "epsilon"
    assert load_base(file, family=family).family.name == family
    for more, answer in (
        ({"prediction_type": "velocity"}, "Invalid value prediction_type='velocity'"),
        ({"prediction_type": "epsilon", "zero_snr": True}, "predicts ε cannot have zero_snr=true"),
        ({"family": "taiyi"}, "is not a whole single-file checkpoint of taiyi"),
        ({"family": "sd9"}, "Invalid value family='sd9'"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            load_base(file, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(UNETS))
def test_a_family_is_known_by_its_parts(family: str, folders: Path) -> None:
    held = load_base(folders / family)
    assert held.family.name == family
    told = held.condition(["一只狗在雪地里", "s狗"] if family == "taiyi" else ["a dog", "a cat"], (64, 48))
    with torch.no_grad():
        said = held.unet(torch.randn(2, 4, 8, 6), torch.tensor([3, 900]), **unet_arguments(told)).sample
    assert said.shape == (2, 4, 8, 6)
    assert not torch.equal(told.hidden_states[0], told.hidden_states[1])


def test_a_single_file_of_a_family_without_that_layout(folders: Path) -> None:
    with pytest.raises(DiffgraftError, match="The family taiyi has no single-file layout"):
        ldm_state_dict(load_base(folders / "taiyi"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_id_of_the_hub(variant: str | None, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client keeps a model it has fetched: read without a connection."""
    cache = tmp_path / "hub" / "models--someone--a-model"
    snapshot = cache / "snapshots" / "0123abc"
    if variant:
        load_base(folders / "sd1", torch.float16).pipeline().save_pretrained(snapshot, variant=variant)
    else:
        shutil.copytree(folders / "sd1", snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load_base("someone/a-model", None)
    assert found.name == "someone/a-model"
    assert found.hash == load_base(folders / "sd1").hash
    assert found.unet.dtype == (torch.float16 if variant else torch.float32)
    with pytest.raises(DiffgraftError, match="The base 'someone/another' was not found: there is no folder or file"):
        load_base("someone/another")


def answer(source: str | Path) -> str:
    with pytest.raises(DiffgraftError) as caught:
        load_base(source)
    return str(caught.value)


def test_what_is_no_base_is_refused_in_a_sentence(base: Base, tmp_path: Path) -> None:
    assert "The base 'no/such-model' was not found" in answer("no/such-model")
    assert "has no model_index.json" in answer(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04pickle")
    assert "must be .safetensors" in answer(tmp_path / "model.ckpt")
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "lora.safetensors")
    assert "--adapter" in answer(tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 7)
    assert "is not a readable .safetensors file" in answer(tmp_path / "cut.safetensors")
    (tmp_path / "model_index.json").write_text("{", "utf-8")
    assert "cannot be read as JSON" in answer(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}', "utf-8")
    assert "holds a SanaPipeline" in answer(tmp_path)
    shutil.copytree(loading.TINY, tmp_path / "torn")
    (tmp_path / "torn" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet has no weights in .safetensors" in answer(tmp_path / "torn")
    assert base.name == "tiny"


def test_the_hash_is_that_of_the_weights_as_they_came(base: Base) -> None:
    """Whatever is attached or merged when it is asked for."""
    held = load_base("tiny")
    with torch.no_grad():
        held.unet.conv_in.bias += 1
    assert held.hash == base.hash


def test_what_decides_a_picture_is_hashed_alike_in_every_process(base: Base) -> None:
    """Diffusers notes the fields that were left at their defaults, in an order that changes between processes."""
    scheduler = type(base.scheduler)(beta_end=0.013)
    hashes = []
    for order in (["beta_start", "clip_sample"], ["clip_sample", "beta_start"]):
        scheduler.register_to_config(_use_default_values=order)
        hashes.append(replace(base, scheduler=scheduler).generation_hash)
    assert hashes[0] == hashes[1] != base.generation_hash


@pytest.mark.scale
def test_stable_diffusion_15_at_its_real_size(pictures: Path, tmp_path: Path) -> None:
    """The real configuration with random weights: load from folder and single file, train a step, export, load."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diffgraft.adapters.formats import load_adapter
    from diffgraft.generation.graft import graft
    from diffgraft.trainers.run.train import train

    sizes = {
        part: json.loads((loading.CONFIGS / "sd1" / part / "config.json").read_text("utf-8"))
        for part in ("unet", "vae", "text_encoder")
    }
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(sizes["vae"]),
        unet=UNet2DConditionModel.from_config(sizes["unet"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"])),
        tokenizer=CLIPTokenizer.from_pretrained(loading.TINY / "tokenizer"),
        scheduler=loading.load_base("tiny").scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert sum(value.numel() for value in pipe.unet.parameters()) == 859_520_964
    pipe.to(torch.float16).save_pretrained(tmp_path / "folder")
    held = load_base(tmp_path / "folder", torch.bfloat16)
    settings: dict[str, Any] = {"subject": "dog", "steps": 1, "resolution": 64, "sample_prompts": "a dog"}
    settings |= {"prior": {"weight": 0}, "output": tmp_path / "run"}
    run = train("sd15-subject", base=held, images=pictures, **settings)
    adapter = load_adapter(run.adapter_file)
    assert len(adapter.modules) == 128
    before = held.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    with graft(held, {adapter: 1.0}):
        pass
    assert torch.equal(held.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight, before)
    whole = ldm_state_dict(load_base(tmp_path / "folder", torch.float16))
    write_safetensors(tmp_path / "model.safetensors", whole, {})
    assert load_base(tmp_path / "model.safetensors", torch.float16).hash == held.hash


def test_four_bits_are_found_by_their_number() -> None:
    with pytest.raises(DiffgraftError, match="Invalid value quantize='int4': for 4 bits use 'nf4'"):
        load_base("tiny", quantize="int4")  # type: ignore[arg-type]
