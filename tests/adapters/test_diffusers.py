"""Files of diffusers, on bases of every family: it reads what we write, and we read what it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.methods.lora import low_rank
from diffgraft.bases import load_base
from diffgraft.bases.layers import choose_layers, parts_of
from diffgraft.generation.graft import graft
from tests.adapters.test_families import random_lora, said
from tests.adapters.toys import shaken
from tests.conftest import fresh

FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.mark.parametrize("layers", ["attention", "all"])
@pytest.mark.parametrize("dialect", ["diffusers", "lycoris"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_it_reads_what_we_write(family: str, dialect: str, layers: str, folders: Path, tmp_path: Path) -> None:
    folder = folders / family
    base = load_base(folder)
    adapter = random_lora(base, layers)
    file = adapter.save(tmp_path / "a.safetensors", dialect)
    if dialect == "lycoris":
        ours = (
            "lora_unet_input_blocks_4_1_proj_in" if family == "sdxl" else "lora_unet_down_blocks_1_attentions_0_proj_in"
        )
        assert (f"{ours}.lora_down.weight" in load_file(file)) == (layers == "all")
        assert any(key.startswith("lora_te1_" if family == "sdxl" else "lora_te_") for key in load_file(file))
    again = load_adapter(file)
    assert set(again.modules) == set(adapter.modules)
    for path, (delta,) in adapter.deltas.items():
        (other,) = again.deltas[path]
        if dialect == "lycoris":
            assert all(torch.equal(leaf, other.leaves[name]) for name, leaf in delta.leaves.items()), path
        else:
            up, down = delta.leaves["lora_up"], delta.leaves["lora_down"]
            shape = (up.shape[0], *down.shape[1:])
            torch.testing.assert_close(other.delta(shape), delta.delta(shape))
    bare = said(base)
    with graft(base, {file: 0.7}):
        wanted = said(base)
    other = load_base(folder)
    pipe = other.pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    assert (wanted - bare).abs().max() > 0.01
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-5)
    pipe.set_adapters(["a"], [1.0])
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_projection_behind_a_text_encoder_has_no_level(folders: Path, tmp_path: Path) -> None:
    """What is extracted of whole checkpoints of XL has a change of it, and its name differs from all others."""
    from peft import PeftModel

    base, other = fresh(folders / "sdxl"), fresh(folders / "sdxl")
    out, width = base.text_encoder_2.text_projection.weight.shape
    deltas = dict(random_lora(base, "attention").deltas)
    deltas["text_encoder_2.text_projection"] = (low_rank(torch.randn(2, width), torch.randn(out, 2), 2.0),)
    adapter = Adapter({path: own for path, own in deltas.items() if path.startswith("text_encoder_2.")})
    bare = base.condition(["a dog"]).added["text_embeds"]
    with graft(base, {adapter: 1.0}):
        wanted = base.condition(["a dog"]).added["text_embeds"]
    assert (wanted - bare).abs().max() > 0.1
    adapter.save(tmp_path / "a.safetensors", "diffusers")
    pipe = other.pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    torch.testing.assert_close(other.condition(["a dog"]).added["text_embeds"], wanted, rtol=1e-4, atol=1e-5)
    third = fresh(folders / "sdxl")
    PeftModel.from_pretrained(third.text_encoder_2, adapter.save(tmp_path / "peft", "peft") / "text_encoder_2")
    torch.testing.assert_close(third.condition(["a dog"]).added["text_embeds"], wanted, rtol=1e-4, atol=1e-5)
    kohya = load_file(adapter.save(tmp_path / "k.safetensors", "kohya"))
    assert "lora_te2_text_projection.lora_up.weight" in kohya
    assert set(load_adapter(tmp_path / "k.safetensors").modules) == set(adapter.modules)


def test_it_reads_our_dora(folders: Path, tmp_path: Path) -> None:
    base, other = fresh(folders / "sdxl"), fresh(folders / "sdxl")
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, (lora,) in random_lora(base, "all").deltas.items():
        outputs = lora.leaves["lora_up"].shape[0]
        deltas[path] = (DoraDelta(lora, torch.rand(outputs, generator=torch.Generator().manual_seed(outputs)) + 0.5),)
    file = Adapter(deltas, {"method": "lora"}).save(tmp_path / "a.safetensors", "diffusers")
    with graft(base, {file: 1.0}):
        wanted = said(base)
    bare = said(other)
    other.pipeline().load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert (wanted - bare).abs().max() > 0.01
    torch.testing.assert_close(said(other), wanted, rtol=1e-3, atol=1e-4)


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_its_scripts_write(family: str, kind: str, folders: Path, tmp_path: Path) -> None:
    """Its own names and header, which keeps peft's configurations: ranks and alphas of their own for some layers."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    base, other = fresh(folders / family), fresh(folders / family)
    parts: dict[str, Any] = {}
    for part, module in parts_of(other).items():
        torch.manual_seed(1)
        layers = choose_layers(part, module, "all" if part == "unet" else "attention")
        patterns = {"rank_pattern": {layers[0]: 5}, "alpha_pattern": {layers[1]: 9.0}}
        config = LoraConfig(
            r=3, lora_alpha=2, target_modules=layers, init_lora_weights=False, **patterns, **KINDS[kind]
        )
        module.add_adapter(config)
        shaken(module, "magnitude")
        parts[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        parts[f"{part}_lora_adapter_metadata"] = config.to_dict()
    wanted = said(other)
    getattr(diffusers, base.family.pipeline_class).save_lora_weights(tmp_path, **parts)
    (file,) = tmp_path.glob("*.safetensors")
    assert (wanted - said(base)).abs().max() > 1e-3
    with graft(base, {file: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)
    again = load_adapter(load_adapter(file).save(tmp_path / "again.safetensors", "diffusers"))
    with graft(base, {again: 1.0}):
        torch.testing.assert_close(said(base), wanted, rtol=1e-3, atol=1e-4)


def test_it_reads_the_words_for_two_text_encoders(folders: Path, tmp_path: Path) -> None:
    """Each encoder's on its own, as its documentation has it: a file of both it does not take."""
    base, other = fresh(folders / "sdxl"), fresh(folders / "sdxl")
    widths = {part: getattr(base, part).config.hidden_size for part in ("text_encoder", "text_encoder_2")}
    vectors = {part: 0.2 * torch.randn(2, width) for part, width in widths.items()}
    word = Adapter({}, {"method": "textual-inversion", "trigger": "<zorp>"}, tokens={"<zorp>": vectors})
    file = word.save(tmp_path / "zorp.safetensors")
    prompt = ["a <zorp> in the snow", "a dog"]
    with graft(base, {file: 1.0}):
        wanted = base.condition(prompt, (64, 128))
    held, pipe = load_file(file), other.pipeline()
    assert set(held) == {"clip_l", "clip_g"}
    for key, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
        pipe.load_textual_inversion(held[key], token="<zorp>", text_encoder=getattr(pipe, part), tokenizer=tokenizer)
    encoded = [pipe.encode_prompt(one, None, "cpu", 1, False) for one in prompt]
    torch.testing.assert_close(torch.cat([one[0] for one in encoded]), wanted.hidden_states)
    torch.testing.assert_close(torch.cat([one[2] for one in encoded]), wanted.added["text_embeds"])
