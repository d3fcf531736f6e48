"""From one format into another and back: every tensor is the same to the bit, and so is what files of XL hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.formats import samples
from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.adapters.ops.compare import compare
from diffgraft.adapters.registry import read_delta, written_dialects
from diffgraft.bases.shapes import layer_shapes
from diffgraft.errors import DiffgraftError

ALL = samples()
"""An adapter of every kind."""
for _large in ("full", "lora, locon, DoRA by outputs"):  # which are written a hundred times
    ALL[_large] = replace(ALL[_large], deltas=dict([*ALL[_large].deltas.items()][::5]))


def saved(adapter: Adapter, folder: Path, dialect: str) -> Path | None:
    """The file, or folder; None where the format cannot hold it."""
    suffix = written_dialects()[dialect].suffix(adapter)
    try:
        return adapter.save(folder / f"{dialect}{suffix}", dialect)
    except DiffgraftError:
        return None


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in the file, or in the files of a folder, under names that say in which."""
    if path.suffix == ".pt":
        held = torch.load(path, weights_only=True)
        if isinstance(held, torch.Tensor):  # an aesthetic embedding
            return {"embedding": held}
        pairs = {width: pair for width, pair in held.items() if isinstance(width, int)}
        return {f"{w}.{i}.{k}": v for w, pair in pairs.items() for i, net in enumerate(pair) for k, v in net.items()}
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    start = path if path.is_dir() else path.parent
    return {f"{file.relative_to(start).parent}/{k}": v for file in files for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ALL)
def test_there_and_back_to_the_bit(name: str, tmp_path: Path) -> None:
    first = {dialect: path for dialect in written_dialects() if (path := saved(ALL[name], tmp_path / "a", dialect))}
    assert "diffgraft" in first
    ways = 0
    for one, start in first.items():
        for two in first:
            there = saved(load_adapter(start), tmp_path / f"{one}-{two}", two)
            assert there is not None
            back = saved(load_adapter(there), tmp_path / f"{one}-{two}-{one}", one)
            assert back is not None
            before, after = tensors(start), tensors(back)
            assert before.keys() == after.keys()
            if two == "diffusers" != one:  # whose layout has the scale in the factors
                errors = compare(load_adapter(start), load_adapter(back)).errors
                assert max(errors.values()) < 1e-6
                ways += 1
                continue
            for key, value in before.items():
                assert value.dtype == after[key].dtype
                assert torch.equal(value, after[key]), f"{key}, through {two}"
            ways += 1
    assert ways == len(first) ** 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Files of other tools are in half precision; nothing is made larger, or rounded, on the way."""
    for name in ("lora, locon", "loha, DoRA by outputs", "lokr", "full"):
        halved: dict[str, tuple[Delta, ...]] = {
            path: tuple(read_delta(d.kind, {k: v.to(dtype) for k, v in d.leaves.items()}, d.alpha) for d in own)
            for path, own in ALL[name].deltas.items()
        }
        adapter = Adapter(halved, ALL[name].metadata)
        file = adapter.save(tmp_path / f"{name}.safetensors", "lycoris")
        own = load_adapter(file).save(tmp_path / f"{name}-2.safetensors", "diffgraft")
        again = load_file(load_adapter(own).save(tmp_path / f"{name}-3.safetensors", "lycoris"))
        for key, value in load_file(file).items():
            assert value.dtype == (torch.float32 if key.endswith(".alpha") else dtype)
            assert torch.equal(value, again[key])


def test_what_webui_reads_for_xl_has_the_names_of_the_original(tmp_path: Path) -> None:
    """It takes diffusers' name of the upper levels' last convolution for another layer, without a word."""
    path = "unet.up_blocks.0.upsamplers.0.conv"
    out, width, *kernel = layer_shapes("sdxl")[path]
    delta = low_rank(torch.ones(2, width, *kernel), torch.ones(out, 2, 1, 1), 1.0)
    for dialect in ("kohya", "webui", "lycoris"):
        file = Adapter({path: (delta,)}, {"base": {"family": "sdxl"}}).save(
            tmp_path / f"{dialect}.safetensors", dialect
        )
        assert {key.partition(".")[0] for key in load_file(file)} == {"lora_unet_output_blocks_2_2_conv"}
        assert load_adapter(file).modules == [path]


def test_text_encoders_have_the_level_that_transformers_has_dropped(tmp_path: Path) -> None:
    """Other tools know no other names; files of trainers that left it away are read all the same."""
    one = (low_rank(torch.ones(2, 5), torch.ones(7, 2), 1.0),)
    path = "text_encoder.encoder.layers.3.self_attn.q_proj"
    for family, prefix in (("sd1", "lora_te"), ("sd2", "lora_te"), ("sdxl", "lora_te1")):
        file = Adapter({path: one}, {"base": {"family": family}}).save(tmp_path / "a.safetensors", "kohya")
        name = f"{prefix}_text_model_encoder_layers_3_self_attn_q_proj"
        assert {key.partition(".")[0] for key in load_file(file)} == {name}
        held = {key.replace("_text_model", ""): value for key, value in load_file(file).items()}
        save_file(held, tmp_path / "b.safetensors")
        assert load_adapter(tmp_path / "b.safetensors").modules == [path]
    file = Adapter({path: one}).save(tmp_path / "c.safetensors", "diffusers")
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in load_file(file))
    held = {key.replace(".text_model", ""): value for key, value in load_file(file).items()}
    save_file(held, tmp_path / "d.safetensors")
    assert load_adapter(tmp_path / "d.safetensors").modules == [path]


def test_an_alpha_of_zero_is_a_scale_of_zero(tmp_path: Path) -> None:
    """As webui and ComfyUI have it; a file without alphas has a scale of 1."""
    down, up = torch.ones(2, 5), torch.ones(7, 2)
    start = "lora_unet_mid_block_attentions_0_proj_in"
    plain = {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
    for tensors_, scale in (({**plain, f"{start}.alpha": torch.tensor(0.0)}, 0.0), (plain, 1.0)):
        save_file(tensors_, tmp_path / "a.safetensors")
        ((delta,),) = load_adapter(tmp_path / "a.safetensors").deltas.values()
        torch.testing.assert_close(delta.apply(torch.zeros(7, 5), None, 1.0)[0], scale * up @ down)
