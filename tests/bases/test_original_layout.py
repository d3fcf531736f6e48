"""The original layouts: every layer has one place in them, as in diffusers' own converters of checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

from diffgraft.bases.original_layout import OriginalLayer, OriginalLayout
from diffgraft.bases.original_weights import original_state_dict
from diffgraft.bases.registry import families
from tests.flow_bases import flow_pipeline

REAL: Mapping[str, Callable[[], nn.Module]] = {
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "flux1": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
    "flux2-klein": lambda: diffusers.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680
    ),
    "zimage": diffusers.ZImageTransformer2DModel,
    "qwen-image": diffusers.QwenImageTransformer2DModel,
    "krea2": diffusers.Krea2Transformer2DModel,
    "auraflow": lambda: diffusers.AuraFlowTransformer2DModel(pos_embed_max_size=9216),
    "qwen-image-21": diffusers.QwenImage21Transformer2DModel,
    "anima": lambda: diffusers.CosmosTransformer3DModel(
        num_attention_heads=16, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None
    ),
}
"""Family → its transformer in one of its published sizes"""
CONVERTERS: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux1": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2-klein": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "zimage": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "krea2": converters.convert_krea2_transformer_checkpoint_to_diffusers,
    "auraflow": converters.convert_auraflow_transformer_checkpoint_to_diffusers,
    "anima": converters.convert_cosmos_transformer_checkpoint_to_diffusers,
    "qwen-image-21": converters.convert_qwen_image21_transformer_checkpoint_to_diffusers,
}
LAYOUTS = {name: family.original for name, family in families().items() if family.original is not None}


def modules(network: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in network.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}


def places(layout: OriginalLayout, network: nn.Module) -> dict[str, tuple[OriginalLayer, int]]:
    """Path of each module → the original layer that holds it, and as which part."""
    found = {path: layout.find(path) for path in modules(network)}
    assert None not in found.values(), [path for path, place in found.items() if place is None]
    return {path: (place.layer, place.part or 0) for path, place in found.items() if place is not None}


def original_state(layout: OriginalLayout, network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network of diffusers under the names of the original layout."""
    return original_state_dict(layout, network.state_dict())


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_layer_of_a_real_base_has_one_place(family: str) -> None:
    layout = LAYOUTS[family]
    with torch.device("meta"):
        network = REAL[family]()
    shapes = {path: tuple(module.weight.shape) for path, module in modules(network).items()}
    parts: dict[str, list[str | None]] = {}
    for path, (layer, part) in places(layout, network).items():
        assert layer.layers[part] == path
        slots = parts.setdefault(layer.path, [None] * len(layer.layers))
        assert slots[part] is None
        slots[part] = path
    for name, slots in parts.items():
        assert None not in slots, name
        named = layout.find(name)
        assert named is not None
        assert named.part in (None, 0)
        own = [shapes[path] for path in slots if path is not None]
        total = sum(shape[0] for shape in own)
        assert [stop - start for start, stop in named.layer.bounds(total)] == [shape[0] for shape in own]
        assert len({shape[1:] for shape in own}) == 1
        if len(own[0]) == 2:
            assert named.layer.has_shape(total, own[0][1])
        assert layout.find(name.replace(".", "_")) == named


@pytest.mark.parametrize("family", CONVERTERS)
def test_real_bases_are_converted_by_diffusers_to_the_same_names_and_shapes(family: str) -> None:
    with torch.device("meta"):
        network = REAL[family]()
    state = original_state(LAYOUTS[family], network)
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in CONVERTERS[family](state).items()} == wanted


@pytest.mark.parametrize("family", [name for name in CONVERTERS if name != "flux1"])
def test_values_are_where_diffusers_has_them(family: str) -> None:
    network = flow_pipeline(family).transformer
    back = CONVERTERS[family](original_state(LAYOUTS[family], network))
    wanted = network.state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in back.items())


def test_values_of_flux_are_where_diffusers_has_them() -> None:
    """Diffusers' converter splits at the real width, so the weights here have that many rows, but few columns."""
    with torch.device("meta"):
        network: Any = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    layout = LAYOUTS["flux1"]
    wanted = {
        name: torch.randn(value.shape[0], *[2] * (value.ndim - 1)) for name, value in network.state_dict().items()
    }
    rows: dict[str, list[Tensor]] = {}
    for name, value in wanted.items():
        path, _, end = name.rpartition(".")
        named = layout.find(path)
        assert named is not None
        end = "scale" if "_norm" in named.layer.path else end
        whole = value if not named.layer.swapped else torch.cat(value.chunk(2)[::-1])
        parts = rows.setdefault(f"{named.layer.path}.{end}", [torch.empty(0)] * len(named.layer.layers))
        parts[named.part or 0] = whole
    back = CONVERTERS["flux1"]({name: torch.cat(parts) for name, parts in rows.items()})
    assert back.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in back.items())


def test_names_of_other_bases_and_damaged_ones_are_not_found() -> None:
    for name in (
        "double_blocks.0.img_attn.qvk",
        "double_blocks.x.img_attn.qkv",
        "double_blocks.0.1.img_attn.qkv",
        "down_blocks.0.attentions.0.proj_in",
        "time_embed.0",
        "",
    ):
        assert all(layout.find(name) is None for layout in LAYOUTS.values()), name
    with pytest.raises(ValueError, match=r"has 10 rows, which are not divisible by 3"):
        OriginalLayer("a.qkv", ("q", "k", "v"), (1, 1, 1)).bounds(10)
