"""Checkpoints with adapters merged in: they draw what the graft draws, and the base stays as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors.torch import load_file

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base, load_base
from diffgraft.bases.header_config import CONFIG_KEY
from diffgraft.bases.meta_base import meta_base
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_safetensors
from diffgraft.generation.graft import graft
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.generation.settings import DrawSettings
from diffgraft.trainers.run.folder import Run
from tests.drawing import generate
from tests.generation.test_graft import bits, lora


def draw(base: Base) -> Image.Image:
    return generate(base, ["a sks dog"], DrawSettings(steps=3), [1])[0]


def test_a_baked_base_draws_what_the_graft_draws(base: Base, short_run: Run, tmp_path: Path) -> None:
    before = bits(base)
    adapters = {short_run.adapter_file: 0.8, lora(1): 0.5}
    folder = merge_checkpoint(base, adapters, tmp_path / "dog")
    assert bits(base) == before
    assert [path.name for path in tmp_path.iterdir()] == ["dog"]
    with graft(base, adapters):
        wanted = draw(base)
    assert np.array_equal(np.asarray(draw(load_base(folder))), np.asarray(wanted))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "taiyi"])
def test_a_folder_has_the_names_and_files_that_every_version_of_transformers_reads(
    family: str, folders: Path, tmp_path: Path
) -> None:
    """Of versions before 5.5: ``text_model.`` before all weights of CLIP, and the tokenizer as words and merges."""
    base = load_base(folders / family)
    folder = merge_checkpoint(base, {}, tmp_path / "whole")
    for name, part in base.parts():
        if not name.startswith("text_encoder"):
            continue
        found = load_file(folder / name / "model.safetensors")
        plain = {key.removeprefix("text_model."): value for key, value in part.state_dict().items()}
        assert {key.removeprefix("text_model."): value.shape for key, value in found.items()} == {
            key: value.shape for key, value in plain.items() if "position_ids" not in key
        }
        assert all(torch.equal(value, plain[key.removeprefix("text_model.")]) for key, value in found.items())
        without = {key for key in found if not key.startswith("text_model.")}
        assert without <= {"text_projection.weight"} if family != "taiyi" else len(without) == len(found)
        files = {path.name for path in (folder / name.replace("text_encoder", "tokenizer")).iterdir()}
        assert files >= ({"vocab.txt"} if family == "taiyi" else {"vocab.json", "merges.txt"})
    assert load_base(folder).hash == base.hash


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_holds_what_the_graft_makes(family: str, folders: Path, tmp_path: Path) -> None:
    base = load_base(folders / family)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, width = base.unet.get_submodule(path).weight.shape
    adapter = lora(1, (out, width), f"unet.{path}")
    whole = merge_checkpoint(base, {adapter: 0.5}, tmp_path / "whole.safetensors")
    found = load_base(whole)
    with graft(base, {adapter: 0.5}):
        assert torch.equal(found.unet.get_submodule(path).weight, base.unet.get_submodule(path).weight)
    assert found.hash != base.hash
    assert [item.name for item in tmp_path.iterdir()] == ["whole.safetensors"]


def test_the_precision_of_the_base_is_kept(tmp_path: Path) -> None:
    folder = merge_checkpoint(load_base("tiny", torch.bfloat16), {lora(1): 1.0}, tmp_path / "half")
    from safetensors import safe_open

    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_from_a_folder_into_one_file_and_back_to_the_bit(family: str, folders: Path, tmp_path: Path) -> None:
    """Parts in precisions of their own keep them; what an adapter does not touch is the same, too."""
    base = load_base(folders / family)
    dtypes = {"unet": torch.float16, "text_encoder": torch.bfloat16, "text_encoder_2": torch.float16}
    for name, part in base.parts():
        part.to(dtypes.get(name, torch.float32))
    folder = merge_checkpoint(base, {}, tmp_path / "folder")
    single = merge_checkpoint(load_base(folder, None), {}, tmp_path / "one.safetensors")
    again = merge_checkpoint(load_base(single, None), {}, tmp_path / "again")
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, width = base.unet.get_submodule(path).weight.shape
    merged = merge_checkpoint(
        load_base(single, None), {lora(1, (out, width), f"unet.{path}"): 0.5}, tmp_path / "merged"
    )
    for name, part in base.parts():
        for found in (folder, again, merged):
            (file,) = (found / name).glob("*.safetensors")
            held = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
            wanted = {key.removeprefix("text_model."): value for key, value in part.state_dict().items()}
            changed = {key for key, value in wanted.items() if not torch.equal(held[key], value)}
            assert changed == ({f"{path}.weight"} if (found, name) == (merged, "unet") else set())
            assert {value.dtype for value in held.values()} == {dtypes.get(name, torch.float32)}


def test_what_no_weight_can_hold_is_refused(base: Base, tmp_path: Path) -> None:
    word = Adapter({}, {"method": "textual-inversion"}, tokens={"<zorp>": {"text_encoder": torch.ones(1, 64)}})
    with pytest.raises(DiffgraftError, match="holds words, which cannot be merged into weights"):
        merge_checkpoint(base, {word: 1.0}, tmp_path / "x")
    with pytest.raises(DiffgraftError, match="already exists"):
        merge_checkpoint(base, {lora(1): 1.0}, tmp_path)
    with pytest.raises(DiffgraftError, match="does not fit this base"):
        merge_checkpoint(base, {lora(1, path="unet.nowhere.to_k"): 1.0}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_of_a_smaller_unet_has_every_weight_where_diffusers_reader_finds_it(
    base: Base, tmp_path: Path
) -> None:
    """Its header says how it is built, so that it is a base again: number of heads, noise schedule and all."""
    file = merge_checkpoint(base, {lora(1): 1.0}, tmp_path / "tiny.safetensors")
    (path,) = lora(1).deltas
    with graft(base, {lora(1): 1.0}):
        wanted = {name: value.clone() for name, value in base.unet.state_dict().items()}
    read = convert_ldm_unet_checkpoint(load_file(file), base.unet.config)
    assert set(read) == set(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in read.items())
    with open_weights(file) as ours, open_weights("tiny") as bare:
        assert set(ours) == set(bare)
        assert torch.equal(ours[f"{path}.weight"], wanted[f"{path.removeprefix('unet.')}.weight"])
    found, planned = load_base(file), meta_base(file)
    assert torch.equal(found.unet.state_dict()[f"{path.removeprefix('unet.')}.weight"], ours_of(wanted, path))
    for part, other in base.parts():
        own = dict(found.parts())[part].state_dict()
        assert all(torch.equal(own[name], value) for name, value in other.state_dict().items() if part != "unet")
    for one in (found, planned):
        assert (one.resolution, one.prediction_type, one.zero_snr) == (64, "v_prediction", True)
        assert dict(one.parts())["unet"].config.attention_head_dim == base.unet.config.attention_head_dim
        assert one.vae.config.scaling_factor == base.vae.config.scaling_factor
        assert type(one.scheduler) is type(base.scheduler)


@pytest.mark.parametrize("said", ['["a"]', '{"unet": 3}', "{", "[" * 10_000, '{"unet": {"layers_per_block": "many"}}'])
def test_a_header_that_says_no_configuration_is_refused_in_a_sentence(base: Base, tmp_path: Path, said: str) -> None:
    file = merge_checkpoint(base, {}, tmp_path / "tiny.safetensors")
    weights = load_file(file)
    write_safetensors(tmp_path / "odd.safetensors", weights, {"format": "pt", CONFIG_KEY: said})
    for read in (load_base, meta_base):
        with pytest.raises(DiffgraftError) as caught:
            read(tmp_path / "odd.safetensors")
        assert "\n" not in str(caught.value)


def ours_of(weights: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    return weights[f"{path.removeprefix('unet.')}.weight"]
