"""Transformers in single files: every layout gives the weights of the folder, to the bit."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor, GGUFParameter
from safetensors.torch import save_file
from torch import Tensor, nn

import diffgraft as dg
from diffgraft.bases import Base, load_base
from diffgraft.bases.gguf_files import open_gguf
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.original_weights import find_weights, original_state_dict
from diffgraft.bases.registry import families
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.bases.transformer_files import open_transformer
from diffgraft.errors import DiffgraftError
from tests.bases.test_original_layout import REAL
from tests.flow_bases import flow_folder
from tests.recipes import SUBJECT

SIZES: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    **{family: (family, make) for family, make in REAL.items()},
    "sd3 medium": (
        "sd3",
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=24, pos_embed_max_size=192, num_attention_heads=24, caption_projection_dim=1536
        ),
    ),
    "flux schnell": ("flux1", diffusers.FluxTransformer2DModel),
    "klein 9B": (
        "flux2-klein",
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        ),
    ),
}
"""Published sizes: name → family, and its transformer"""
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


def layout_of(family: str) -> OriginalLayout:
    layout = families()[family].original
    assert layout is not None
    return layout


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def write(path: Path, state: Mapping[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path, header)
    return path


def original(base: Base, prefix: str = "") -> dict[str, Tensor]:
    state = original_state_dict(layout_of(base.family.name), base.denoiser.state_dict())
    return {prefix + name: value for name, value in state.items()}


def same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        # the original layout has some tables on one axis
        assert torch.equal(value.reshape(wanted[name].shape), wanted[name]), name


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_told_by_names_and_shapes(size: str) -> None:
    """Each weight has one place in either layout, and the shapes give the configuration back."""
    family, make = SIZES[size]
    with torch.device("meta"):
        network: Any = make()
    state = network.state_dict()
    theirs = original_state_dict(layout_of(family), state)
    for named in (theirs, state):
        places, unknown = find_weights(layout_of(family), shapes_of(named))
        assert not unknown
        assert places.keys() == state.keys()
        assert {place.key for place in places.values()} == named.keys()
        counts = dict.fromkeys(named, 0)
        for name, place in places.items():
            counts[place.key] += state[name].numel()
        assert counts == {key: value.numel() for key, value in named.items()}
        shapes = {name: (place.stop - place.start, *named[place.key].shape[1:]) for name, place in places.items()}
        told = families()[family].denoiser_config(ShapeTable("file", shapes), {})
        with torch.device("meta"):
            again: Any = type(network).from_config({**told})
        assert shapes_of(again.state_dict()) == shapes_of(state)
        different = {key for key in network.config if again.config[key] != network.config[key] and key[0] != "_"}
        assert different <= {"out_channels", "all_patch_size", "all_f_patch_size", "dual_attention_layers"}


def test_a_file_of_any_layout_gives_the_base_of_the_folder(flow_base: Base, tmp_path: Path) -> None:
    wanted = flow_base.denoiser.state_dict()
    states = [*(original(flow_base, start) for start in PREFIXES), wanted]
    files = [write(tmp_path / f"{place}.safetensors", state) for place, state in enumerate(states)]
    for file in files:
        with open_transformer(file) as opened:
            assert opened is not None
            assert opened.family is flow_base.family
            same_bits({name: read() for name, shape, read in opened.weights()}, wanted)
    base = load_base(files[0], components=flow_base.name)
    assert base.hash == flow_base.hash
    assert base.components_from == flow_base.name
    same_bits(base.denoiser.state_dict(), wanted)
    if flow_base.family.name != "flux1":  # diffusers' reader of that one only knows the published width
        theirs = type(flow_base.denoiser).from_single_file(
            str(files[0]), config=flow_base.name, subfolder="transformer", local_files_only=True
        )
        same_bits(theirs.state_dict(), wanted)
