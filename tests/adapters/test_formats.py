"""Adapter files: the same bits back, read by diffusers, and refused in one sentence when they are no good."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank, with_alpha
from diffgraft.bases import Base
from diffgraft.bases.shapes import layer_shapes
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft


def made_up(base: Base, text: bool = True) -> Adapter:
    """LoRA with mixed ranks and alphas on a few layers of the embedded base."""
    torch.manual_seed(2)
    deltas: dict[str, Any] = {}
    parts = [("unet", base.unet, ("to_k", "to_out.0"))]
    parts += [("text_encoder", base.text_encoder, ("q_proj", "out_proj", "fc1"))] if text else []
    from diffgraft.bases.layers import find_modules

    for part, module, endings in parts:
        for number, path in enumerate(find_modules(module, endings)):
            out_width, in_width = module.get_submodule(path).weight.shape
            rank, alpha = (3, 2.0) if number % 3 else (5, 7.5)
            down, up = torch.randn(rank, in_width) * 0.2, torch.randn(out_width, rank) * 0.2
            deltas[f"{part}.{path}"] = (low_rank(down, up, alpha),)
    return Adapter(deltas, {"method": "lora", "trigger": "sks"})


@pytest.mark.parametrize("dialect", ["lycoris", "diffgraft"])
def test_saved_and_loaded_are_the_same_bits(base: Base, dialect: str, tmp_path: Path) -> None:
    adapter = made_up(base)
    again = load_adapter(adapter.save(tmp_path / "new folder" / "a.safetensors", dialect))
    assert again.metadata == adapter.metadata
    assert set(again.modules) == set(adapter.modules)
    for path, (lora,) in adapter.deltas.items():
        (other,) = again.deltas[path]
        assert set(lora.leaves) == set(other.leaves)
        assert all(torch.equal(leaf, other.leaves[name]) for name, leaf in lora.leaves.items())
        assert lora.alpha == other.alpha
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["a.safetensors"]


def test_keys_and_header_are_those_of_diffusers(base: Base, tmp_path: Path) -> None:
    adapter = made_up(base)
    path = adapter.save(tmp_path / "a.safetensors", "diffusers")
    keys = set(load_file(path))
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in keys
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    config = json.loads(header["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (3, 3)
    assert set(config["unet.alpha_pattern"].values()) == set(config["unet.rank_pattern"].values()) == {5}
    assert json.loads(header["diffgraft"])["trigger"] == "sks"
    again = load_adapter(path)
    for name, (lora,) in adapter.deltas.items():
        (other,) = again.deltas[name]
        shape = (lora.leaves["lora_up"].shape[0], lora.leaves["lora_down"].shape[1])
        torch.testing.assert_close(other.delta(shape), lora.delta(shape))


def test_a_file_without_a_format_has_the_names_of_kohya(base: Base, tmp_path: Path) -> None:
    """Most programs open those; a DoRA by outputs, which most of them misread there, has diffusers' layout."""
    adapter = made_up(base)
    path = adapter.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora"
    held = load_file(path)
    for name, (lora,) in adapter.deltas.items():
        part, _, inside = name.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + inside.replace(".", "_")
        assert torch.equal(held[f"{prefix}.lora_up.weight"], lora.leaves["lora_up"])
        assert torch.equal(held[f"{prefix}.lora_down.weight"], lora.leaves["lora_down"])
        assert float(held[f"{prefix}.alpha"]) == lora.alpha
    one = low_rank(torch.ones(2, 5), torch.ones(7, 2), 1.0)
    file = Adapter({"unet.proj_in": (DoraDelta(one, torch.ones(7)),)}).save(tmp_path / "dora.safetensors")
    assert "unet.proj_in.lora_magnitude_vector.weight" in load_file(file)


def of_one_alpha(adapter: Adapter) -> Adapter:
    """With alpha 2 everywhere: diffusers takes the commonest of a file in kohya's names for all of it."""
    return Adapter({path: (with_alpha(lora, 2.0),) for path, (lora,) in adapter.deltas.items()}, adapter.metadata)


@pytest.mark.parametrize("dialect", ["auto", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_diffusers_alone_draws_our_picture(base: Base, tmp_path: Path, strength: float, dialect: str) -> None:
    """The adapter in a plain pipeline, by diffusers' own loader, and by ours: within 2/255."""
    adapter = made_up(base) if dialect == "diffusers" else of_one_alpha(made_up(base))
    path = adapter.save(tmp_path / "a.safetensors", dialect)

    def draw(pipe: Any) -> np.ndarray:
        seeds = [torch.Generator().manual_seed(number) for number in range(2)]
        images = pipe(["a dog in the snow"] * 2, num_inference_steps=4, guidance_scale=3.0, generator=seeds).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    pipe = base.pipeline()
    bare = draw(pipe)
    with graft(pipe, {path: strength}):
        ours = draw(pipe)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="it")
    pipe.set_adapters(["it"], [strength])
    theirs = draw(pipe)
    pipe.unload_lora_weights()
    assert np.abs(ours - bare).max() > 20
    assert np.abs(ours - theirs).max() <= 2
    assert np.array_equal(draw(pipe), bare)


def refused(path: Path) -> str:
    with pytest.raises(DiffgraftError) as caught:
        load_adapter(path)
    return str(caught.value)


def test_what_cannot_be_read_is_refused_in_a_sentence(base: Base, tmp_path: Path) -> None:
    good = made_up(base).save(tmp_path / "good.safetensors", "diffusers")
    bad = tmp_path / "bad.safetensors"
    assert "there is no file" in refused(tmp_path / "none.safetensors")
    assert "is a folder" in refused(tmp_path)
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path / "m.ckpt")
    assert "is a whole checkpoint, not an adapter" in refused(tmp_path / "m.ckpt")
    bad.write_bytes(b"")
    assert "not a readable .safetensors file" in refused(bad)
    bad.write_bytes(b"PK\x03\x04 no tensors here" * 10)
    assert "not a readable .safetensors file" in refused(bad)
    bad.write_bytes(good.read_bytes()[:-100])
    assert "incomplete" in refused(bad)

    tensors = load_file(good)
    first = next(key for key in tensors if key.startswith("unet.") and key.endswith("lora_A.weight"))
    save_file({key: value for key, value in tensors.items() if key != first}, bad)
    assert first.removesuffix(".lora_A.weight") in refused(bad)
    save_file({**tensors, "unet.conv_in.lora_magic": torch.zeros(1)}, bad)
    assert "unet.conv_in.lora_magic" in refused(bad)
    save_file({**tensors, first: torch.zeros(4, 9)}, bad)
    assert "do not fit together" in refused(bad)
    save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, bad)
    assert "NaN" in refused(bad)
    save_file({"conv.weight": torch.zeros(2, 3)}, bad)
    assert "conv.weight" in refused(bad)
    save_file(tensors, bad, {"lora_adapter_metadata": "{"})
    assert "is not valid JSON" in refused(bad)


def test_a_strange_key_is_told_with_what_it_may_have_been_meant_as(tmp_path: Path) -> None:
    """The nearest known key, and the base whose layers the rest of the file fits."""
    shapes = {path: shape for path, shape in layer_shapes("sd2").items() if path.endswith(("to_q", "to_k", "q_proj"))}
    loras = {p: (low_rank(torch.ones(2, shape[1]), torch.ones(shape[0], 2)),) for p, shape in shapes.items()}
    adapter, bad = Adapter(loras, {"base": {"family": "sd2"}}), tmp_path / "bad.safetensors"
    start = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    plain, flat = f"unet.{start}", f"lora_unet_{start.replace('.', '_')}"
    for dialect, right, wrong in (
        ("diffusers", f"{plain}.lora_A.weight", f"{plain}.lora_AA.weight"),
        ("diffusers", f"{plain}.lora_A.weight", f"uned.{start}.lora_A.weight"),
        ("kohya", f"{flat}.lora_down.weight", f"{flat}.lora_dwn.weight"),
        ("kohya", f"{flat}.lora_up.weight", f"loro_unet_{start.replace('.', '_')}.lora_up.weight"),
        ("kohya", f"{flat}.alpha", f"{flat}.alphas"),
    ):
        tensors = load_file(adapter.save(tmp_path / "good.safetensors", dialect))
        save_file({wrong if key == right else key: value for key, value in tensors.items()}, bad)
        said = refused(bad)
        assert f"unknown key {wrong}: expected" in said
        assert f"; the nearest known key is {right}, and its other modules are those of sd2." in said
    native = adapter.save(tmp_path / "native.safetensors", "diffgraft")
    with safe_open(native, framework="pt") as file:
        header = file.metadata()
    save_file({**load_file(native), f"{plain}.7.lora_down": torch.ones(1)}, bad, header)
    assert f"did you mean '{plain}.0.lora_down'" in refused(bad)


def test_a_misspelt_module_is_told_of(tmp_path: Path) -> None:
    """It could be of a base that is not known here, so the file is read; most of its modules say that it is not."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    start = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    one = (low_rank(torch.ones(2, 5), torch.ones(7, 2)),)
    for dialect in ("diffusers", "kohya"):
        file = Adapter({f"{start}.{name}": one for name in names}).save(tmp_path / f"{dialect}.safetensors", dialect)
        held = {key.replace("mid_block", "mid_blcok", key.count("to_q")): v for key, v in load_file(file).items()}
        save_file(held, tmp_path / "bad.safetensors")
        with pytest.warns(UserWarning, match="no known base has 1 of its modules, such as .*did you mean 'mid_b"):
            load_adapter(tmp_path / "bad.safetensors")
    save_file(
        {f"unet.a.{side}.weight": torch.ones(3, 3) for side in ("lora_A", "lora_B")}, tmp_path / "own.safetensors"
    )
    assert load_adapter(tmp_path / "own.safetensors").modules == ["unet.a"]


def test_names_of_files_say_what_they_are(base: Base, tmp_path: Path) -> None:
    for name in ("a.pt", "a.bin", "a.txt", "a"):
        with pytest.raises(DiffgraftError, match=r"has the safetensors format, so call it a\.safetensors"):
            made_up(base).save(tmp_path / name, "kohya")
    with pytest.raises(DiffgraftError, match="There is nothing to write"):
        Adapter({}, {"method": "lora"}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    made_up(base).save(tmp_path / "adapter.safetensors")
    assert load_adapter(tmp_path).modules == load_adapter(tmp_path / "adapter.safetensors").modules


def test_what_is_for_something_else_is_said(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for key in (
        "diffusion_model.blocks.0.self_attn.k.lora_A.weight",
        "lora_unet_single_blocks_0_linear1_qkv.lora_down.weight",
        "lora_transformer_single_stream_blocks_0_attn_to_k.lora_down.weight",
    ):
        save_file({key: torch.ones(2, 5), key.replace("_A", "_B").replace("down", "up"): torch.ones(7, 2)}, path)
        assert "is for a base of an unknown family, whose denoiser is a transformer" in refused(path)
    base.pipeline().save_pretrained(tmp_path / "folder")
    assert "is a whole checkpoint, not an adapter" in refused(tmp_path / "folder")
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, path)
    assert "is a whole checkpoint, not an adapter" in refused(path)


def test_without_a_header_the_scale_is_one(base: Base, tmp_path: Path) -> None:
    """As diffusers has it: no alpha in the file means scale 1."""
    save_file(load_file(made_up(base).save(tmp_path / "a.safetensors", "diffusers")), tmp_path / "bare.safetensors")
    for (lora,) in load_adapter(tmp_path / "bare.safetensors").deltas.values():
        assert lora.alpha == lora.leaves["lora_down"].shape[0]


def test_what_the_layout_cannot_say_is_refused_and_not_dropped(tmp_path: Path) -> None:
    delta = low_rank(torch.zeros(2, 5), torch.zeros(7, 2), 2.0)
    with pytest.raises(DiffgraftError, match=r"vae\.decoder\.proj is not in transformer, unet, text_encoder"):
        Adapter({"unet.proj": (delta,), "vae.decoder.proj": (delta,)}).save(tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(DiffgraftError, match="the diffusers layout holds only one plain LoRA per module"):
        Adapter({"unet.proj": (delta, delta)}).save(tmp_path / "x.safetensors", "diffusers")
    with pytest.raises(DiffgraftError, match="is ambiguous when written with underscores"):
        Adapter({"unet.my_own.layer": (delta,)}).save(tmp_path / "x.safetensors", "lycoris")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_names_the_known(base: Base, tmp_path: Path) -> None:
    with pytest.raises(DiffgraftError, match="did you mean 'diffusers'"):
        made_up(base).save(tmp_path / "a.safetensors", format="difusers")
    assert not list(tmp_path.iterdir())
