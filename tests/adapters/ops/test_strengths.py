"""Strengths by part and by block mean the same as in the webui world."""

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.strengths import BLOCK_LISTS, BLOCKS, block_of, strengths_of
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.loading import CONFIGS
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft


def unet(family: str) -> Any:
    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text("utf-8"))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize(
    ("family", "layers", "count"), [("sd1", "attention", 17), ("sd1", "all", 26), ("sdxl", "attention", 12)]
)
def test_lists_have_one_number_for_each_block_that_such_files_touch(family: str, layers: str, count: int) -> None:
    """LoRA touches the attentions' blocks alone; LoCon all but the first, which is a convolution that none adapts."""
    touched = {block_of(f"unet.{path}") for path in choose_layers("unet", unet(family), layers)}
    assert touched <= set(BLOCK_LISTS[count])
    assert set(BLOCK_LISTS[count]) - touched <= {"BASE", "IN00"}


def test_blocks_of_well_known_modules() -> None:
    for path, block in {
        "unet.conv_in": "IN00",
        "unet.down_blocks.0.attentions.0.proj_in": "IN01",
        "unet.down_blocks.0.downsamplers.0.conv": "IN03",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "M00",
        "unet.up_blocks.0.resnets.0.conv1": "OUT00",
        "unet.up_blocks.3.attentions.2.proj_out": "OUT11",
        "unet.up_blocks.1.upsamplers.0.conv": "OUT05",
        "unet.conv_out": "BASE",
        "unet.time_embedding.linear_1": "BASE",
        "text_encoder.encoder.layers.3.mlp.fc1": "BASE",
        "unet.something.else": "BASE",
    }.items():
        assert block_of(path) == block, path


def test_what_is_not_named_has_one_and_parts_multiply() -> None:
    strengths = strengths_of("a", {"unet": 0.5, "M00": 0.2, "text_encoder": 0.0})
    assert strengths.at("unet.mid_block.resnets.0.conv1") == pytest.approx(0.1)
    assert strengths.at("unet.conv_in") == 0.5
    assert strengths.at("text_encoder_2.encoder.layers.0.mlp.fc1") == 0.0
    numbers = [0.0] * 17
    numbers[BLOCK_LISTS[17].index("OUT04")] = -0.3
    strengths = strengths_of("a", numbers)
    assert strengths.at("unet.up_blocks.1.attentions.1.proj_in") == -0.3
    assert strengths.at("text_encoder.encoder.layers.0.mlp.fc1") == 0
    assert strengths_of("a", 0.7).at("unet.conv_in") == 0.7
    for value, answer in (
        ([1.0] * 13, "a list of 13 numbers; lists by block have 12, 17, 20, 26"),
        ({"OUT5": 1.0}, "did you mean 'OUT05'"),
        ({"M00": "x"}, "'x' is not a number"),
        (float("nan"), "nan is not a number"),
    ):
        with pytest.raises(DiffgraftError, match=answer):
            strengths_of("a", value)
    assert len(BLOCKS) == 26


def test_a_graft_takes_blocks() -> None:
    class Target:
        unet: Any = None

    torch.manual_seed(0)
    target = Target()
    target.unet = UNet2DConditionModel(
        block_out_channels=(8, 12, 12, 12), cross_attention_dim=10, attention_head_dim=4, norm_num_groups=4
    )
    paths = choose_layers("unet", target.unet, "attention")
    deltas = {}
    for path in paths:
        out, width = target.unet.get_parameter(f"{path}.weight").shape
        deltas[f"unet.{path}"] = (low_rank(torch.randn(2, width), torch.randn(out, 2)),)
    before = {path: target.unet.get_parameter(f"{path}.weight").clone() for path in paths}
    with graft(target, {Adapter(deltas): {"unet": 0.5, "IN01": 0.0, "OUT11": 2.0}}):
        for path in paths:
            (delta,) = deltas[f"unet.{path}"]
            strength = {"IN01": 0.0, "OUT11": 1.0}.get(block_of(f"unet.{path}"), 0.5)
            wanted = before[path] + strength * delta.delta(tuple(before[path].shape))
            torch.testing.assert_close(target.unet.get_parameter(f"{path}.weight").detach(), wanted)


def test_blocks_in_which_nothing_changes_are_told_of() -> None:
    adapter = Adapter({"unet.mid_block.attentions.0.proj_in": (low_rank(torch.ones(2, 5), torch.ones(5, 2)),)})
    assert strengths_of("a", {"unet": 0.5, "M00": 0.0, "OUT05": 0.0}).unused_blocks(adapter) == ["OUT05"]
    assert strengths_of("a", [0.0] * 12).unused_blocks(adapter) == []
    with pytest.raises(DiffgraftError, match=r"Write fractions with a point: 0\.8"):
        strengths_of("a", [0.0, 8.0])
