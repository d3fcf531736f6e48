"""Custom Diffusion: as the processors of diffusers train it, and as diffusers reads and writes its folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.ops.convert import convert
from diffgraft.adapters.registry import get_method, read_delta
from diffgraft.bases import Base, load_base
from diffgraft.bases.layers import choose_layers
from diffgraft.bases.unet import unet_arguments
from diffgraft.bases.weights import open_weights
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from tests.adapters.toys import shake
from tests.conftest import fresh

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
PROMPTS = ["a <new1> dog", "a <new1>"]


def attach(base: Base, **options: Any) -> Attached:
    method = get_method("custom")
    paths = {"unet": choose_layers("unet", base.unet, "context")}
    return method.attach(base, Spec(paths, 1, 1.0, 0, method.read_options(options), trigger="<new1>", noun="dog"))


def trained(base: Base) -> Adapter:
    """Every parameter moved off its start."""
    live = attach(base)
    shake(live, size=0.1)
    adapter = live.adapter({"method": "custom", "trigger": "<new1>", "base": {"family": base.family.name}})
    live.detach()
    return adapter


def states_of(base: Base) -> dict[str, Any]:
    return unet_arguments(base.condition(PROMPTS, (64, 128)))


def predicted(base: Base, told: dict[str, Any]) -> Tensor:
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    found: Tensor = base.unet(x, torch.tensor([300, 700]), **told).sample
    return found


def processors(base: Base) -> dict[str, Any]:
    """As ``train_custom_diffusion.py`` sets them, with ``--freeze_model crossattn_kv``: copies of keys and values."""
    made: dict[str, Any] = {}
    for name in base.unet.attn_processors:
        attention = base.unet.get_submodule(name.removesuffix(".processor"))
        if "attn1" in name:
            made[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        out, width = attention.to_k.weight.shape
        assert out != width
        made[name] = CustomDiffusionAttnProcessor(True, False, out, width)
        state = {f"to_{side}_custom_diffusion.weight": getattr(attention, f"to_{side}").weight for side in "kv"}
        made[name].load_state_dict(state)
    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_forward_and_first_gradients_are_those_of_diffusers_processors(family: str, folders: Path) -> None:
    base, other = fresh(folders / family), fresh(folders / family)
    live = attach(base)
    told = states_of(base)
    theirs = processors(other)
    other.unet.set_attn_processor(dict(theirs))  # which it empties
    states, told_too = told["encoder_hidden_states"], tree_map(Tensor.detach, told)
    states.retain_grad()
    states_too = told_too["encoder_hidden_states"].requires_grad_()
    ours, wanted = predicted(base, told), predicted(other, told_too)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {name: value.grad for name, value in live.trainable().items() if value.grad is not None}
    checked = 0
    for name, processor in theirs.items():
        for side in "kv" if processor.train_kv else "":
            gradient = getattr(processor, f"to_{side}_custom_diffusion").weight.grad
            found = gradients[f"unet.{name.removesuffix('.processor')}.to_{side}.diff"]
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
            checked += 1
    assert checked == sum(name.endswith(".diff") for name in gradients) > 0
    assert states.grad is not None
    assert states_too.grad is not None
    torch.testing.assert_close(states.grad, states_too.grad, rtol=1e-4, atol=1e-5 * float(states_too.grad.abs().max()))
    assert states.grad[:, 0].abs().max() == 0  # the token with which all prompts begin
    assert {name for name in gradients if "<new1>" in name} == {name for name in live.trainable() if "<new1>" in name}
    live.detach()


def test_diffusers_loads_the_exported_folder(folders: Path, tmp_path: Path) -> None:
    folder = folders / "sd1"
    base, other = fresh(folder), load_base(folder)  # a word is added to its tokenizer
    adapter = trained(base)
    with open_weights(folder) as weights:
        done = convert(adapter, tmp_path / "new", "custom-diffusion", weights=weights)
    assert sorted(file.name for file in done.path.iterdir()) == ["<new1>.safetensors", WEIGHTS]
    assert max(done.comparison.errors.values()) < 1e-5
    held = load_file(done.path / WEIGHTS)
    blocks = {key.partition(".attn")[0] for key in held}
    assert set(held) == {f"{block}.attn1.processor" for block in blocks} | {
        f"{block}.attn2.processor.to_{side}_custom_diffusion.weight" for block in blocks for side in "kv"
    }
    pipe = other.pipeline()
    pipe.unet.load_attn_procs(done.path, weight_name=WEIGHTS, _pipeline=pipe)
    pipe.load_textual_inversion(done.path, weight_name="<new1>.safetensors")
    bare = predicted(base, states_of(base))
    with graft(base, {adapter: 1.0}), torch.no_grad():
        wanted = predicted(base, states_of(base))
    with graft(base, {load_adapter(done.path): 1.0}), torch.no_grad():
        again = predicted(base, states_of(base))
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        found = predicted(other, {"encoder_hidden_states": pipe.text_encoder(ids)[0]})
    assert (wanted - bare).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_what_diffusers_writes_is_read(safe: bool, folders: Path, tmp_path: Path) -> None:
    folder = folders / "sd1"
    base, other = fresh(folder), load_base(folder)  # a word is added to its tokenizer
    theirs = processors(other)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for processor in theirs.values():
            for value in processor.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        row = 0.1 * torch.randn(1, base.text_encoder.config.hidden_size, generator=generator)
    other.unet.set_attn_processor(dict(theirs))  # which it empties
    other.unet.save_attn_procs(tmp_path, safe_serialization=safe)
    word = {"<new1>": row[0]}  # as ``save_new_embed`` of the script writes it, in either form
    if safe:
        save_file(word, tmp_path / "<new1>.safetensors")
    else:
        torch.save(word, tmp_path / "<new1>.bin")
    pipe = other.pipeline()
    pipe.load_textual_inversion(word, token="<new1>")
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    adapter = load_adapter(tmp_path)
    assert (adapter.method, adapter.metadata["trigger"], list(adapter.tokens)) == ("custom", "<new1>", ["<new1>"])
    with torch.no_grad():
        wanted = predicted(other, {"encoder_hidden_states": pipe.text_encoder(ids)[0]})
        with graft(base, {adapter: 1.0}):
            torch.testing.assert_close(predicted(base, states_of(base)), wanted, rtol=1e-5, atol=1e-5)
    # the same adapter is trained further from what the weights differ from the base's
    live = attach(base)
    assert live.load(adapter) == {*adapter.deltas, "text_encoder.<new1>"}
    with torch.no_grad():
        torch.testing.assert_close(predicted(base, states_of(base)), wanted, rtol=1e-5, atol=1e-5)
    live.detach()


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"a.attn2.processor.to_k_custom_diffusion.weight": Path("x")}, tmp_path / WEIGHTS.replace("safetensors", "bin")
    )
    with pytest.raises(DiffgraftError, match=r"may be code .* Download it as \.safetensors"):
        load_adapter(tmp_path)


def test_what_its_folders_cannot_hold_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    base = fresh(folders / "sd1")
    adapter = trained(base)
    with pytest.raises(DiffgraftError, match=r"hold new weights, not differences: name the base \(--base\)"):
        convert(adapter, tmp_path / "a", "custom-diffusion")
    with pytest.raises(DiffgraftError, match="a delta of kind full, but such files hold new weights"):
        adapter.save(tmp_path / "a", "custom-diffusion")
    path = next(path for path in adapter.deltas if path.endswith("to_k")).replace("attn2", "attn1")
    wrong = Adapter({path: (read_delta("replacement", {"weight": torch.ones(5, 3)}, None),)})
    with pytest.raises(DiffgraftError, match=r"attn1.to_k, but such files hold only projections of cross-attention"):
        wrong.save(tmp_path / "a", "custom-diffusion")
    with pytest.raises(DiffgraftError, match="holds no weights"):
        Adapter(tokens=adapter.tokens).save(tmp_path / "a", "custom-diffusion")
    with open_weights(folders / "sd1") as weights, pytest.raises(DiffgraftError, match="give the name of a new folder"):
        convert(adapter, tmp_path / "a.safetensors", "custom-diffusion", weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_it_starts_from_any_matrix_that_is_added(folders: Path) -> None:
    base = fresh(folders / "sd1")
    adapter = trained(base)
    live = attach(base)
    assert live.load(adapter) == {*adapter.deltas, "text_encoder.<new1>"}
    for path, (delta,) in live.adapter({}).deltas.items():
        assert isinstance(delta, FullDelta)
        assert torch.equal(delta.leaves["diff"], adapter.deltas[path][0].leaves["diff"])
    live.detach()
