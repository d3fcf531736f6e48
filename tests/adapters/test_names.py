"""How files name layers: several names for one, layouts of other tools, counts of layers, families and projections."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffgraft as dg
from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.families import with_base
from diffgraft.adapters.formats.lycoris import to_underscores
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.ops.combine import combine
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.ops.extract import extract
from diffgraft.adapters.ops.glance import glance
from diffgraft.adapters.ops.inspect import inspect, summary
from diffgraft.adapters.ops.resize import resize
from diffgraft.bases.ldm_keys import BlockLayout
from diffgraft.bases.shapes import layer_shapes
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def filled(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(name: str, seed: int, out: int = 14, width: int = 10, rank: int = 2, alpha: float = 1.0) -> dict[str, Tensor]:
    """A LoRA in kohya's leaves, half precision."""
    return {
        f"{name}.lora_down.weight": filled(seed, rank, width).half(),
        f"{name}.lora_up.weight": filled(seed + 1, out, rank).half(),
        f"{name}.alpha": torch.tensor(alpha),
    }


def product(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    """Its ΔW in float64."""
    down, up = (tensors[f"{name}.{leaf}.weight"].double().numpy() for leaf in ("lora_down", "lora_up"))
    alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else down.shape[0]
    found: np.ndarray = alpha / down.shape[0] * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return found


def effect(adapter: Adapter, path: str, *shape: int) -> np.ndarray:
    """What it adds to a weight of zeros."""
    weight, bias = torch.zeros(shape), torch.zeros(shape[0])
    for delta in adapter.deltas[path]:
        weight, _ = delta.apply(weight, bias, 1.0)
    return weight.double().numpy().reshape(shape[0], -1)


def written(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    save_file(tensors, path, header or None)
    return path


@pytest.mark.parametrize(
    ("one", "two", "path"),
    [
        (
            f"lora_unet_{to_underscores(MIDDLE)}",
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
            f"unet.{MIDDLE}",
        ),
        (f"lora_unet_{to_underscores(MIDDLE)}", f"lycoris_{to_underscores(MIDDLE)}", f"unet.{MIDDLE}"),
        (f"lora_unet.{MIDDLE}", "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", f"unet.{MIDDLE}"),
        (
            "lora_te_text_model_encoder_layers_3_mlp_fc1",
            "lora_te1_encoder_layers_3_mlp_fc1",
            "text_encoder.encoder.layers.3.mlp.fc1",
        ),
    ],
)
def test_a_layer_under_two_names_is_the_sum_of_both(tmp_path: Path, one: str, two: str, path: str) -> None:
    tensors = {**pair(one, 1), **pair(two, 5, rank=3, alpha=7)}
    adapter = load_adapter(written(tmp_path / "both.safetensors", tensors))
    want = product(tensors, one) + product(tensors, two)
    assert np.abs(effect(adapter, path, 14, 10) - want).max() < 1e-5
    for dialect in ("kohya", "diffgraft"):
        done = convert(tmp_path / "both.safetensors", tmp_path / f"{dialect}.safetensors", dialect)
        assert done.comparison.worst[1] < 1e-6
        assert np.abs(effect(load_adapter(done.path), path, 14, 10) - want).max() < 1e-5


def test_the_same_numbers_under_two_names_count_once_and_what_is_no_sum_is_refused(tmp_path: Path) -> None:
    one, two = "lora_te_text_model_encoder_layers_0_mlp_fc2", "lora_te1_text_model_encoder_layers_0_mlp_fc2"
    adapter = load_adapter(written(tmp_path / "copy.safetensors", {**pair(one, 1), **pair(two, 1)}))
    want = product(pair(one, 1), one)
    assert np.abs(effect(adapter, "text_encoder.encoder.layers.0.mlp.fc2", 14, 10) - want).max() < 1e-5
    dora = {**pair(one, 1), **pair(two, 5), f"{two}.dora_scale": filled(3, 14, 1).abs()}
    with pytest.raises(DiffgraftError, match="2 times, under different names, and one of them is DoRA"):
        load_adapter(written(tmp_path / "dora.safetensors", dora))


THREE = (
    f"lora_unet_{to_underscores(MIDDLE)}",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    f"lycoris_{to_underscores(MIDDLE)}",
)


@pytest.mark.parametrize("seeds", [(1, 1, 5), (1, 5, 1), (5, 1, 1), (1, 5, 9)])
def test_of_three_names_each_different_one_counts_once(tmp_path: Path, seeds: tuple[int, int, int]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, seed in zip(THREE, seeds, strict=True):
        tensors |= pair(name, seed, rank=1 + seed)
    adapter = load_adapter(written(tmp_path / "three.safetensors", tensors))
    want = sum(product(tensors, name) for name, seed in dict(zip(THREE, seeds, strict=True)).items() if seed != 1)
    want = want + product(pair(THREE[0], 1, rank=2), THREE[0])
    assert np.abs(effect(adapter, f"unet.{MIDDLE}", 14, 10) - want).max() < 1e-5
    assert "modules  1 in unet" in summary(inspect(adapter))
    kohyas = written(tmp_path / "headed.safetensors", tensors, ss_base_model_version="sd_v1")
    assert glance(kohyas) is None  # names alone would count three


def test_a_copy_in_another_precision_or_as_a_convolution_is_a_copy(tmp_path: Path) -> None:
    one, two = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_middle_block_1_proj_in"
    linear = pair(one, 1)
    as_kernel = {
        key.replace(one, two): value[:, :, None, None].float() if value.ndim else value.clone()
        for key, value in linear.items()
    }
    adapter = load_adapter(written(tmp_path / "x.safetensors", {**linear, **as_kernel}))
    got = effect(adapter, "unet.mid_block.attentions.0.proj_in", 14, 10)
    assert np.abs(got - product(linear, one)).max() < 1e-5


def test_two_loras_whose_factors_have_axes_of_one_to_spare_stand_side_by_side(tmp_path: Path) -> None:
    spare = pair(THREE[1], 5)
    spare[f"{THREE[1]}.lora_up.weight"] = spare[f"{THREE[1]}.lora_up.weight"][:, :, None]
    both = written(tmp_path / "x.safetensors", {**pair(THREE[0], 1), **spare})
    done = convert(both, tmp_path / "y.safetensors", "kohya")
    want = product(pair(THREE[0], 1), THREE[0]) + product(spare, THREE[1])
    assert np.abs(effect(load_adapter(done.path), f"unet.{MIDDLE}", 14, 10) - want).max() < 1e-5


def test_two_names_for_layers_of_two_shapes_are_refused(tmp_path: Path) -> None:
    shapes = written(tmp_path / "shapes.safetensors", {**pair(THREE[0], 1), **pair(THREE[1], 5, out=12)})
    with pytest.raises(DiffgraftError, match="the 2 deltas under different names of"):
        load_adapter(shapes)
    kron = {f"{name}.lokr_w1": filled(1, side, 2) for name, side in zip(THREE[:2], (7, 5), strict=True)}
    kron |= {f"{name}.lokr_w2": filled(2, 2, 5) for name in THREE[:2]}
    with pytest.raises(DiffgraftError, match="not for a weight of one shape"):
        load_adapter(written(tmp_path / "kron.safetensors", kron))


def small_unet(layers: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_names_of_the_original_layout_are_counted_by_the_layers_of_the_base(tmp_path: Path, layers: int) -> None:
    unet = small_unet(layers)
    blocks = BlockLayout(layers, (True, True))
    modules = {name: module for name, module in unet.named_modules() if name.endswith(("attn1.to_q", "attn2.to_v"))}
    tensors: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(modules.items()):
        out, width = module.weight.shape
        tensors |= pair(f"lora_unet_{to_underscores(blocks.to_ldm(name))}", 3 * seed, out, width)
    whole = written(tmp_path / "whole.safetensors", tensors)
    assert set(load_adapter(whole).deltas) == {f"unet.{name}" for name in modules}  # all names together tell
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    late = {key: value for key, value in tensors.items() if "output_blocks" in key}
    some = written(tmp_path / "some.safetensors", late)
    with graft(SimpleNamespace(unet=unet), {str(some): 1.0}):
        for name, module in modules.items():
            theirs = f"lora_unet_{to_underscores(blocks.to_ldm(name))}"
            want = product(tensors, theirs) if name.startswith("up_blocks") else 0
            assert np.abs((module.weight - before[name]).detach().double().numpy() - want).max() < 1e-5
    with pytest.raises(DiffgraftError, match="apply it to the base it is for"):
        load_adapter(some)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_operation_counts_names_by_the_layers_of_the_base_and_keeps_the_count(
    tmp_path: Path, layers: int
) -> None:
    unet = small_unet(layers)
    unet.save_pretrained(tmp_path / "base" / "unet")
    blocks = BlockLayout(layers, (True, True))
    tensors: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(unet.named_modules()):
        if name.startswith("up_blocks") and name.endswith("attn2.to_v"):
            tensors |= pair(f"lora_unet_{to_underscores(blocks.to_ldm(name))}", 3 * seed, *module.weight.shape)
    late = written(tmp_path / "late.safetensors", tensors)
    with open_weights(tmp_path / "base") as weights:
        resized = dg.resize(late, 1, base=str(tmp_path / "base"))
        together = dg.combine({late: 0.5, str(late): 0.5}, base=str(tmp_path / "base"))
        converted = convert(late, tmp_path / "diffusers.safetensors", "diffusers", weights=weights)
    (tmp_path / "tuned" / "unet").mkdir(parents=True)
    tuned = {name: value.clone() for name, value in unet.state_dict().items()}
    path = next(name for name in tuned if name.startswith("up_blocks.1") and name.endswith("attn2.to_v.weight"))
    tuned[path] += 1
    save_file(tuned, tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    extracted = dg.extract(str(tmp_path / "tuned"), str(tmp_path / "base"), 1)
    for adapter in (resized, together, load_adapter(converted.path, layers)):
        new = adapter.save(tmp_path / "new.safetensors", "kohya")
        assert {key.partition(".")[0] for key in load_file(new)} == {key.partition(".")[0] for key in tensors}
        new.unlink()
    assert extracted.metadata["base"]["layers_per_block"] == layers
    two = SimpleNamespace(unet=small_unet(2))
    foreign = load_adapter(late, layers)
    both = f"UNets with {min(2, layers)} and {max(2, layers)} layers per block"
    with pytest.raises(DiffgraftError, match=both):
        dg.combine({foreign: 1.0, with_base(foreign, layers_per_block=2): 1.0})
    with pytest.raises(DiffgraftError), graft(two, late):
        pass


XL = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_k"
"""A layer of XL that names alone do not tell from others."""


def test_the_family_is_known_from_shapes_and_kept_by_every_operation(tmp_path: Path) -> None:
    out, width = layer_shapes("sdxl")[f"unet.{XL}"]
    tensors = {
        f"unet.{XL}.lora_A.weight": filled(1, 1, width).half(),
        f"unet.{XL}.lora_B.weight": filled(2, out, 1).half(),
    }
    source = written(tmp_path / "xl.safetensors", tensors)
    theirs = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_k"
    done = convert(source, tmp_path / "kohya.safetensors", "kohya")
    together = combine([("a", load_adapter(done.path), 1.0), ("b", load_adapter(source), 1.0)], RankBudget(rank=1))
    resized = resize(load_adapter(done.path), RankBudget(rank=1))
    files = [
        done.path,
        together.adapter.save(tmp_path / "together.safetensors", "webui"),
        resized.adapter.save(tmp_path / "resized.safetensors", "webui"),
        convert(done.path, tmp_path / "again.safetensors", "kohya").path,
    ]
    for file in files:
        assert {key.partition(".")[0] for key in load_file(file)} == {theirs}
        foreign = load_adapter(file).metadata["base"]
        assert foreign["family"] == "sdxl"
    bare = written(tmp_path / "bare.safetensors", load_file(done.path))
    assert load_file(convert(bare, tmp_path / "bare-2.safetensors", "kohya").path).keys() == load_file(bare).keys()


def test_a_family_that_only_the_header_tells_is_kept_by_every_operation(tmp_path: Path) -> None:
    """Of layers that bases of several families have, in the same shape."""
    names = {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"}
    files = [
        written(
            tmp_path / f"{base}.safetensors",
            {key: value for n, name in enumerate(sorted(names)) for key, value in pair(name, seed + n).items()},
            ss_base_model_version="sdxl_base_v1-0",
            ss_sd_model_name=base,
        )
        for seed, base in ((1, "one"), (5, "two"))
    ]
    first, second = map(load_adapter, files)
    made = {
        "together": combine([("1", first, 1.0), ("2", second, 1.0)]).adapter,
        "twice": combine([("1", first, 1.0), ("1", first, 0.5)]).adapter,
        "resized": resize(first, RankBudget(rank=1)).adapter,
    }
    files = [convert(files[0], tmp_path / "again.safetensors", "kohya").path]
    files += [adapter.save(tmp_path / f"{name}.safetensors", "kohya") for name, adapter in made.items()]
    for file in files:
        assert {key.partition(".")[0] for key in load_file(file)} == names
        assert load_adapter(file).metadata["base"]["family"] == "sdxl"


def test_a_file_of_kohya_s_with_names_of_the_original_layout_is_for_xl(tmp_path: Path) -> None:
    """Its tools use those names for no other base; a file without a header need not tell it otherwise."""
    tensors = pair("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 1)
    bare = written(tmp_path / "bare.safetensors", tensors)
    assert load_adapter(bare).metadata["base"]["family"] == "sdxl"
    assert load_file(convert(bare, tmp_path / "new.safetensors", "kohya").path).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("place", "width", "family"),
    [
        ("mid_block.attentions.0", 768, "sd1"),
        ("mid_block.attentions.0", 1024, "sd2"),
        ("mid_block.attentions.0", 2048, "sdxl"),
        ("down_blocks.0.attentions.0", 1024, "sd2"),
        ("down_blocks.0.attentions.0", 2048, None),
        ("mid_block.attentions.0", 99, None),
    ],
)
def test_the_width_of_the_text_tells_the_family_of_a_base_of_any_size(
    tmp_path: Path, place: str, width: int, family: str | None
) -> None:
    """Such as a distilled one; XL has no attentions in its first block."""
    name = f"lora_unet_{to_underscores(place)}_transformer_blocks_0_attn2_to_k"
    adapter = load_adapter(written(tmp_path / "x.safetensors", pair(name, 1, width=width)))
    assert adapter.metadata.get("base", {}).get("family") == family


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
def test_what_is_extracted_is_for_the_family_of_its_base(tmp_path: Path, width: int, family: str) -> None:
    start = "model.diffusion_model.middle_block.1.transformer_blocks.0"
    same, inner = f"{start}.attn2.to_k.weight", f"{start}.attn1.to_q.weight"
    plain = {same: filled(1, 14, width), inner: filled(2, 14, 10)}
    tuned = {**plain, inner: plain[inner] + filled(3, 14, 1) @ filled(4, 1, 10)}
    files = [written(tmp_path / f"{n}.safetensors", weights) for n, weights in enumerate((tuned, plain))]
    with open_weights(files[0]) as one, open_weights(files[1]) as two:
        found = extract(one, two, RankBudget(rank=1)).adapter
    assert set(found.deltas) == {f"unet.{MIDDLE}"}
    assert found.metadata["base"]["family"] == family


@pytest.mark.parametrize("kind", ["lora", "lokr", "full", "dora"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_projections_are_the_same_layer_on_two_axes_and_on_four(tmp_path: Path, family: str, kind: str) -> None:
    path = "down_blocks.0.attentions.0.proj_in"
    shape = layer_shapes(family)[f"unet.{path}"]
    name, loaded = f"lora_unet_{to_underscores(path)}", []
    for axes in (2, 4):
        ones = [1] * (axes - 2)
        tensors = {
            "lora": {"lora_down.weight": filled(1, 2, 320, *ones), "lora_up.weight": filled(2, 320, 2, *ones)},
            "lokr": {"lokr_w1": filled(3, 4, 5), "lokr_w2": filled(4, 80, 64, *ones)},
            "full": {"diff": filled(5, 320, 320, *ones)},
        }
        tensors["dora"] = {**tensors["lora"], "dora_scale": filled(6, 320, 1, *ones).abs()}
        file = written(
            tmp_path / f"{axes}.safetensors",
            {f"{name}.{leaf}": value for leaf, value in tensors[kind].items()},
            ss_base_model_version="sd_v1" if family == "sd1" else "sd_v2",
        )
        adapter = load_adapter(file)
        (delta,) = adapter.deltas[f"unet.{path}"]
        assert delta.fits(shape)
        loaded.append(delta.apply(filled(7, *shape), None, 1.0)[0])
        if kind == "lora":
            done = convert(file, tmp_path / f"{axes}-new.safetensors", "diffusers")
            assert load_file(done.path)[f"unet.{path}.lora_A.weight"].ndim == len(shape)
    assert torch.equal(*loaded)


@pytest.mark.parametrize("kind", ["lora", "lokr", "full", "dora"])
def test_a_projection_of_an_unknown_family_is_one_layer_on_two_axes_and_on_four(tmp_path: Path, kind: str) -> None:
    """Such as one of a file without a header, whose modules all kinds of bases have."""
    path = "unet.mid_block.attentions.0.proj_in"
    name, loaded = f"lora_{to_underscores(path)}", []
    for axes in (2, 4):
        ones = [1] * (axes - 2)
        tensors = {
            "lora": {"lora_down.weight": filled(1, 2, 10, *ones), "lora_up.weight": filled(2, 14, 2, *ones)},
            "lokr": {"lokr_w1": filled(3, 2, 5), "lokr_w2": filled(4, 7, 2, *ones)},
            "full": {"diff": filled(5, 14, 10, *ones)},
        }
        tensors["dora"] = {**tensors["lora"], "dora_scale": filled(6, 14, 1, *ones).abs()}
        held = {f"{name}.{leaf}": value for leaf, value in tensors[kind].items()}
        loaded.append(load_adapter(written(tmp_path / f"{axes}.safetensors", held)))
    weight = filled(7, 14, 10)
    changed = []
    for adapter in loaded:
        (delta,) = adapter.deltas[path]
        for shape in ((14, 10), (14, 10, 1, 1)):
            assert delta.fits(shape)
            changed.append(delta.apply(weight.view(shape), None, 1.0)[0].view(14, 10))
    assert all(torch.equal(one, changed[0]) for one in changed)
    assert compare(*loaded).worst[1] == 0
    if kind in ("lora", "full"):  # the others do not tell the shape of a weight
        both = combine([("2", loaded[0], 1.0), ("4", loaded[1], 1.0)], RankBudget(rank=10)).adapter
        want = 2 * effect(loaded[0], path, 14, 10)
        assert np.abs(effect(both, path, 14, 10) - want).max() < 1e-4


def test_biases_and_sparse_rests_stand_beside_a_lora(tmp_path: Path) -> None:
    name = "diffusion_model.middle_block.0.in_layers.2"
    tensors = {
        f"{name}.lora_down.weight": filled(1, 2, 10, 3, 3),
        f"{name}.lora_up.weight": filled(2, 14, 2, 1, 1),
        f"{name}.diff_b": filled(3, 14),
    }
    adapter = load_adapter(written(tmp_path / "comfy.safetensors", tensors))
    weight, bias = torch.zeros(14, 10, 3, 3), torch.zeros(14)
    for delta in adapter.deltas["unet.mid_block.resnets.0.conv1"]:
        weight, changed = delta.apply(weight, bias, 0.5)
        bias = bias if changed is None else changed
    assert np.abs(weight.double().numpy().reshape(14, -1) - 0.5 * product(tensors, name)).max() < 1e-5
    assert torch.equal(bias, 0.5 * tensors[f"{name}.diff_b"])

    name = "lora_unet_mid_block_resnets_0_conv1"
    sparse = {
        f"{name}.lora_down.weight": filled(1, 2, 10, 3, 3),
        f"{name}.lora_up.weight": filled(2, 14, 2, 1, 1),
        f"{name}.bias_indices": torch.tensor([[0, 13], [89, 4]], dtype=torch.int16),
        f"{name}.bias_values": torch.tensor([2.0, -3.0]).half(),
        f"{name}.bias_size": torch.tensor([14, 90], dtype=torch.int16),
    }
    want = product(sparse, name)
    want[0, 89] += 2
    want[13, 4] -= 3
    found = effect(
        load_adapter(written(tmp_path / "s.safetensors", sparse)), "unet.mid_block.resnets.0.conv1", 14, 10, 3, 3
    )
    assert np.abs(found - want).max() < 1e-5
    size = f"{name}.bias_size"  # in a file that was cast to another precision as a whole
    cast = load_adapter(written(tmp_path / "cast.safetensors", {**sparse, size: sparse[size].float()}))
    assert np.abs(effect(cast, "unet.mid_block.resnets.0.conv1", 14, 10, 3, 3) - want).max() < 1e-5


def test_names_and_leaves_of_onetrainer(tmp_path: Path) -> None:
    conv = "unet.middle_block.0.skip_connection"
    tensors = {
        **{f"{conv}.hada_{leaf}": filled(n, 14, 2, 1, 1) for n, leaf in enumerate(("w1_a", "w2_a"))},
        **{f"{conv}.hada_{leaf}": filled(n, 2, 10, 1, 1) for n, leaf in enumerate(("w1_b", "w2_b"), 5)},
        **pair("clip_g.text_model.encoder.layers.0.mlp.fc1", 9),
    }
    adapter = load_adapter(written(tmp_path / "omi.safetensors", tensors))
    one, two = (
        (tensors[f"{conv}.hada_w{n}_a"].flatten(1) @ tensors[f"{conv}.hada_w{n}_b"].flatten(1)).numpy() for n in (1, 2)
    )
    found = effect(adapter, "unet.mid_block.resnets.0.conv_shortcut", 14, 10, 1, 1)
    assert np.abs(found - one * two).max() < 1e-5
    shapes = {"lokr_w1": (7, 2, 1, 1), "lokr_w2_a": (2, 3, 1, 1), "lokr_w2_b": (3, 5, 1, 1)}
    kron = {f"{conv}.{leaf}": filled(n, *shape) for n, (leaf, shape) in enumerate(shapes.items())}
    found = effect(
        load_adapter(written(tmp_path / "k.safetensors", kron)), "unet.mid_block.resnets.0.conv_shortcut", 14, 10
    )
    w1, a, b = (leaf.flatten(1).double().numpy() for leaf in kron.values())
    assert np.abs(found - np.kron(w1, a @ b)).max() < 1e-5
    assert "text_encoder_2.encoder.layers.0.mlp.fc1" in adapter.deltas

    dora = {
        f"unet.{MIDDLE}.lora_down.weight": filled(1, 2, 10),
        f"unet.{MIDDLE}.lora_up.weight": filled(2, 14, 2),
        f"unet.{MIDDLE}.dora_scale": filled(3, 1, 10).abs(),
    }
    weight = filled(4, 14, 10).double().numpy()
    v = weight + product(dora, f"unet.{MIDDLE}")
    want = v / np.linalg.norm(v, axis=0, keepdims=True) * dora[f"unet.{MIDDLE}.dora_scale"].double().numpy()
    (delta,) = load_adapter(written(tmp_path / "dora.safetensors", dora)).deltas[f"unet.{MIDDLE}"]
    assert np.abs(delta.apply(torch.from_numpy(weight).float(), None, 1.0)[0].numpy() - want).max() < 1e-5


@pytest.mark.parametrize("blocks", [1, 3])
def test_rotations_of_inputs(tmp_path: Path, blocks: int) -> None:
    above = 0.1 * filled(1, blocks, 6)  # squares of 4 rows
    (delta,) = load_adapter(written(tmp_path / "oft.safetensors", {f"unet.{MIDDLE}.oft_R.weight": above})).deltas[
        f"unet.{MIDDLE}"
    ]
    weight = filled(2, 14, 12).double().numpy()
    turned = np.zeros((12, 12))
    for n in range(3):
        q = np.zeros((4, 4))
        q[np.triu_indices(4, 1)] = above[n % blocks].double().numpy()
        q = q - q.T
        turned[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = np.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    # inputs x are turned before the layer, x · R, so that the layer's weight is W · Rᵀ
    assert np.abs(delta.apply(torch.from_numpy(weight).float(), None, 1.0)[0].numpy() - weight @ turned.T).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_read_exactly_and_written_on_request(tmp_path: Path, dtype: torch.dtype) -> None:
    name = f"lora_unet_{to_underscores(MIDDLE)}"
    tensors = {key: value if key.endswith("alpha") else value.to(dtype) for key, value in pair(name, 1).items()}
    file = written(tmp_path / "small.safetensors", tensors)
    wide = {key: value.float() for key, value in tensors.items()}
    assert np.abs(effect(load_adapter(file), f"unet.{MIDDLE}", 14, 10) - product(wide, name)).max() < 1e-5
    again = convert(file, tmp_path / "again.safetensors", "kohya", precision=str(dtype).removeprefix("torch."))
    assert load_file(again.path)[f"{name}.lora_up.weight"].dtype == dtype
    assert again.comparison.worst[1] == 0
    scaled = {**tensors, f"{name}.lora_up.scale_weight": torch.tensor(0.3), "scaled_fp8": torch.zeros(2).to(dtype)}
    found = load_adapter(written(tmp_path / "scaled.safetensors", scaled))
    assert np.abs(effect(found, f"unet.{MIDDLE}", 14, 10) - 0.3 * product(wide, name)).max() < 1e-5


def test_scales_of_eight_bits_belong_to_leaves_of_any_name(tmp_path: Path) -> None:
    name, scales = f"lora_unet_{to_underscores(MIDDLE)}", {"w1_a": 0.5, "w1_b": 2.0, "w2_a": 3.0, "w2_b": 0.25}
    small = {
        leaf: filled(n, *((14, 2) if leaf.endswith("a") else (2, 10))).to(torch.float8_e4m3fn)
        for n, leaf in enumerate(scales)
    }
    one, two = (small[f"w{n}_a"].double() @ small[f"w{n}_b"].double() for n in (1, 2))
    want = (0.5 * 2.0 * one) * (3.0 * 0.25 * two)
    for ending in ("_scale", ".scale_weight", ".weight_scale"):
        tensors = {f"{name}.hada_{leaf}": value for leaf, value in small.items()}
        tensors |= {f"{name}.hada_{leaf}{ending}": torch.tensor(scale) for leaf, scale in scales.items()}
        found = effect(load_adapter(written(tmp_path / "x.safetensors", tensors)), f"unet.{MIDDLE}", 14, 10)
        assert np.abs(found - want.numpy()).max() < 1e-5


def test_nothing_is_written_before_all_is_checked(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    loha = {
        **{f"{name}.hada_{leaf}": filled(n, 14, 2) for n, leaf in enumerate(("w1_a", "w2_a"))},
        **{f"{name}.hada_{leaf}": filled(n, 2, 90) for n, leaf in enumerate(("w1_b", "w2_b"), 5)},
    }
    file = written(tmp_path / "loha.safetensors", loha)
    assert convert(file, tmp_path / "same.safetensors", "lycoris").comparison.worst[1] == 0
    half = convert(file, tmp_path / "half.safetensors", "lycoris", precision="float16")
    assert 0 < half.comparison.worst[1] < 1e-2
    large = {**loha, f"{name}.hada_w1_a": 1e6 * loha[f"{name}.hada_w1_a"]}
    with pytest.raises(DiffgraftError, match="largest of float16"):
        convert(
            written(tmp_path / "large.safetensors", large),
            tmp_path / "none.safetensors",
            "lycoris",
            precision="float16",
        )
    assert {path.stem for path in tmp_path.iterdir()} == {"loha", "same", "half", "large"}


def test_nothing_is_left_of_a_file_that_cannot_be_compared(tmp_path: Path) -> None:
    name = f"lora_unet_{to_underscores(MIDDLE)}"
    vast = {f"{name}.lokr_w1": filled(1, 300, 99), f"{name}.lokr_w2": filled(2, 300, 98)}
    file = written(tmp_path / "vast.safetensors", vast)
    for target in ("half.safetensors", "new/half.safetensors"):
        with pytest.raises(DiffgraftError, match="larger than the layers of any known base"):
            convert(file, tmp_path / target, "lycoris", precision="float16")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_an_infinite_alpha_of_whole_factors_means_nothing(tmp_path: Path) -> None:
    name = f"lora_unet_{to_underscores(MIDDLE)}"
    one, two = filled(1, 2, 5), filled(2, 7, 2)
    tensors = {f"{name}.lokr_w1": one, f"{name}.lokr_w2": two, f"{name}.alpha": torch.tensor(1e10).half()}
    adapter = load_adapter(written(tmp_path / "lokr.safetensors", tensors))
    found = effect(adapter, f"unet.{MIDDLE}", 14, 10)
    assert np.abs(found - np.kron(one.double().numpy(), two.double().numpy())).max() < 1e-5
    lora = {**pair(name, 1), f"{name}.alpha": torch.tensor(float("inf"))}
    with pytest.raises(DiffgraftError, match="expected a finite number"):
        load_adapter(written(tmp_path / "lora.safetensors", lora))


@pytest.mark.parametrize("named", [".default", ""])
def test_older_folders_of_peft(tmp_path: Path, named: str) -> None:
    start = f"base_model.model.{MIDDLE}"
    tensors = {
        f"{start}.lora_A{named}.weight": filled(1, 2, 10),
        f"{start}.lora_B{named}.weight": filled(2, 14, 2),
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}), "utf-8")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    want = 1.5 * (tensors[f"{start}.lora_B{named}.weight"].double() @ tensors[f"{start}.lora_A{named}.weight"].double())
    assert np.abs(effect(load_adapter(tmp_path), f"unet.{MIDDLE}", 14, 10) - want.numpy()).max() < 1e-5


def test_what_stays_true_of_the_training_is_kept(tmp_path: Path) -> None:
    name = f"lora_unet_{to_underscores(MIDDLE)}"
    header = {"ss_tag_frequency": '{"5_dog": {"dog": 3}}', "ss_network_dim": "2", "ss_clip_skip": "2"}
    one = load_adapter(written(tmp_path / "1.safetensors", pair(name, 1), **header))
    header |= {"ss_tag_frequency": '{"2_cat": {"cat": 4}}', "ss_clip_skip": "1"}
    two = load_adapter(written(tmp_path / "2.safetensors", pair(name, 5), **header))
    kept = resize(one, RankBudget(rank=1)).adapter.metadata["foreign"]
    assert kept == {"ss_tag_frequency": '{"5_dog": {"dog": 3}}', "ss_clip_skip": "2"}
    both = combine([("1", one, 1.0), ("2", two, 1.0)]).adapter.metadata["foreign"]
    assert json.loads(both["ss_tag_frequency"]) == {"5_dog": {"dog": 3}, "2_cat": {"cat": 4}}
    assert "ss_clip_skip" not in both


def test_a_base_for_inpainting_has_another_first_layer(tmp_path: Path) -> None:
    start = "model.diffusion_model."
    first, inner = f"{start}input_blocks.0.0.weight", f"{start}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    plain = {first: filled(1, 8, 4, 3, 3), inner: filled(2, 14, 10)}
    tuned = {first: filled(3, 8, 9, 3, 3), inner: plain[inner] + filled(4, 14, 1) @ filled(5, 1, 10)}
    files = [written(tmp_path / f"{n}.safetensors", weights) for n, weights in enumerate((tuned, plain))]
    with open_weights(files[0]) as one, open_weights(files[1]) as two:
        found = extract(one, two, RankBudget(rank=1))
    assert found.dropped == ("unet.conv_in.weight",)
    want = (filled(4, 14, 1).double() @ filled(5, 1, 10).double()).numpy()
    assert np.abs(effect(found.adapter, f"unet.{MIDDLE}", 14, 10) - want).max() < 1e-4


def test_keys_of_a_checkpoint_s_names_are_those_of_an_adapter_where_they_end_so(tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    adapter = load_adapter(written(tmp_path / "x.safetensors", pair(name, 1)))
    assert np.abs(effect(adapter, f"unet.{MIDDLE}", 14, 10) - product(pair(name, 1), name)).max() < 1e-5
    with pytest.raises(DiffgraftError, match="is a whole checkpoint, not an adapter"):
        load_adapter(written(tmp_path / "y.safetensors", {f"{name}.weight": filled(1, 14, 10)}))


@pytest.mark.parametrize("name", ["default", "default_0", "dog-1"])
def test_names_of_adapters_in_memory_are_left_out_of_keys(tmp_path: Path, name: str) -> None:
    tensors = {
        f"unet.{MIDDLE}.lora_A.{name}.weight": filled(1, 2, 10),
        f"unet.{MIDDLE}.lora_B.{name}.weight": filled(2, 14, 2),
    }
    adapter = load_adapter(written(tmp_path / "x.safetensors", tensors))
    want = filled(2, 14, 2).double() @ filled(1, 2, 10).double()
    assert np.abs(effect(adapter, f"unet.{MIDDLE}", 14, 10) - want.numpy()).max() < 1e-5


@pytest.mark.parametrize("leaf", ["magnitude", "dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("factors", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_lengths_beside_diffusers_factors_leave_the_alpha_of_the_header(
    tmp_path: Path, leaf: str, factors: tuple[str, str]
) -> None:
    down, up, lengths = filled(1, 2, 10), filled(2, 14, 2), filled(3, 14).abs()
    path = f"unet.{MIDDLE}"
    tensors = {f"{path}.{factors[0]}.weight": down, f"{path}.{factors[1]}.weight": up, f"{path}.{leaf}": lengths}
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 1})
    adapter = load_adapter(written(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=config))
    weight = filled(4, 14, 10)
    v = weight.double().numpy() + 0.5 * (up.double() @ down.double()).numpy()
    want = lengths.double().numpy()[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    got, _ = adapter.deltas[path][0].apply(weight, None, 1.0)
    assert np.abs(got.double().numpy() - want).max() < 1e-5


def test_an_alpha_that_is_no_number_is_refused_where_it_means_something(tmp_path: Path) -> None:
    name = "lora_unet_" + to_underscores(MIDDLE)
    with pytest.raises(DiffgraftError, match="its alpha is inf; expected a finite number"):
        load_adapter(written(tmp_path / "x.safetensors", {**pair(name, 1), f"{name}.alpha": torch.tensor(1e5).half()}))
    whole = {
        f"{name}.lokr_w1": filled(1, 7, 2),
        f"{name}.lokr_w2": filled(2, 2, 5),
        f"{name}.alpha": torch.tensor(np.nan),
    }
    adapter = load_adapter(written(tmp_path / "y.safetensors", whole))
    want = np.kron(filled(1, 7, 2).double().numpy(), filled(2, 2, 5).double().numpy())
    assert np.abs(effect(adapter, f"unet.{MIDDLE}", 14, 10) - want).max() < 1e-5
