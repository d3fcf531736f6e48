"""The names of the original layout, held to diffusers' own reader of it, on the real configurations."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffgraft.bases.ldm_keys import BlockLayout, ldm_vae_key, open_clip_state_dict
from diffgraft.bases.loading import CONFIGS

COUNTS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
"""Tensors of the UNet in checkpoints of the family."""


def _read(family: str, part: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((CONFIGS / family / part / "config.json").read_text("utf-8"))
    return found


def _unet(family: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(_read(family, "unet"))


@pytest.mark.parametrize("family", sorted(COUNTS))
def test_every_name_of_the_unet_goes_there_and_back(family: str) -> None:
    """Diffusers' reader gives each tensor the name it came from, and so does ours."""
    unet = _unet(family)
    blocks = BlockLayout.from_config(unet.config)
    state = unet.state_dict()
    named = {blocks.to_ldm(name): name for name in state}
    assert len(named) == len(state) == COUNTS[family]
    assert {theirs: blocks.to_diffusers(theirs) for theirs in named} == named
    marked = {f"model.diffusion_model.{theirs}": torch.tensor(float(row)) for row, theirs in enumerate(named)}
    read = convert_ldm_unet_checkpoint(marked, unet.config)
    assert {name: int(value) for name, value in read.items()} == {name: row for row, name in enumerate(named.values())}


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("sd1", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("sd1", "up_blocks.2.upsamplers.0.conv.bias", "output_blocks.8.2.conv.bias"),
        ("sdxl", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
        ("sdxl", "down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight"),
        ("sdxl", "add_embedding.linear_2.weight", "label_emb.0.2.weight"),
    ],
)
def test_names_as_checkpoints_have_them(family: str, ours: str, theirs: str) -> None:
    """An upsampler comes behind the attention where its level has one; readers do not care, and other tools do."""
    assert BlockLayout.from_config(_unet(family).config).to_ldm(ours) == theirs


@pytest.mark.parametrize("family", sorted(COUNTS))
def test_modules_as_well_as_parameters(family: str) -> None:
    unet = _unet(family)
    blocks = BlockLayout.from_config(unet.config)
    paths = [path for path, module in unet.named_modules() if [*module.parameters(recurse=False)]]
    assert [blocks.to_diffusers(blocks.to_ldm(path)) for path in paths] == paths


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.0.resnets",
        "down_blocks.0.resnets.0.conv3.weight",
        "down_blocks.0.upsamplers.0.conv.weight",
        "up_blocks.0.upsamplers",
        "mid_block.resnets.0.to_q",
        "conv_input.weight",
        "unet.conv_in.weight",
    ],
)
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is not a pa"):
        BlockLayout(2, (True, True, True, False)).to_ldm(path)


@pytest.mark.parametrize(
    "path",
    ["input_blocks.12.0.in_layers.0", "input_blocks.3.1.op", "output_blocks.3.2.norm", "middle_block.3.norm", "out.1"],
)
def test_what_is_no_path_of_the_original_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is not a pa"):
        BlockLayout(2, (True, True, True, False)).to_diffusers(path)


def test_every_name_of_the_vae_is_what_diffusers_reads() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(_read("sd1", "vae"))
    levels = len(vae.config.block_out_channels)
    named = {ldm_vae_key(name, levels): name for name in vae.state_dict()}
    assert len(named) == 248
    rows = {name: torch.tensor(float(row)) for row, name in enumerate(named)}
    # the reader takes the attention's matrices for 1 x 1 convolutions, which they are in the files
    marked = {
        f"first_stage_model.{name}": value.view(1, 1, 1, 1) if "attn_1" in name and name.endswith("weight") else value
        for name, value in rows.items()
    }
    read = convert_ldm_vae_checkpoint(marked, vae.config)
    assert {name: int(value) for name, value in read.items()} == {name: row for row, name in enumerate(named.values())}


def test_open_clip_is_what_diffusers_reads() -> None:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        **{**_read("sdxl", "text_encoder_2"), "hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 4}
        | {"num_hidden_layers": 3, "projection_dim": 12, "vocab_size": 40}
    )
    encoder = CLIPTextModelWithProjection(config)
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    marked = {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip_state_dict(state)}
    read = convert_open_clip_checkpoint(encoder, marked, prefix="conditioner.embedders.1.model.")
    found = {name.removeprefix("text_model."): value for name, value in read.items() if "position_ids" not in name}
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
