"""Bases in 8 and 4 bits compute, and teach, as whole ones would whose weights are what the bits stand for."""

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Attached
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.quantized import Quantized, bytes_when_quantized, weight_and_bias
from diffgraft.errors import DiffgraftError
from diffgraft.generation.graft import graft
from diffgraft.generation.merge_checkpoint import merge_checkpoint
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.files import load_recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.train import train
from tests.conftest import SHORT
from tests.recipes import ON_PICTURES, SUBJECT

KINDS = ("int8", "nf4")
# Dettmers et al. 2023, arXiv:2305.14314, appendix E
_BELOW = [1.0, 0.6961928009986877, 0.5250730514526367, 0.39491748809814453, 0.28444138169288635, 0.18477343022833]
_ABOVE = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434]
NF4 = np.array([*(-x for x in _BELOW), -0.09105003625154495, 0.0, *_ABOVE, 0.5626170039176941, 0.7229568362236023, 1.0])


def layers(base: Base) -> Iterator[tuple[str, Quantized]]:
    for part, module in base.parts():
        for path, layer in module.named_modules():
            if isinstance(layer, Quantized):
                yield f"{part}.{path}", layer


def whole(base: Base) -> Base:
    """A copy of a quantised base with plain layers, of the weights that the bits stand for."""
    copied = copy.deepcopy(base)
    for path, layer in list(layers(copied)):
        part, _, inside = path.partition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).requires_grad_(False)
        plain.weight.data, plain.bias = layer.dequantized().to(base.unet.dtype), layer.bias
        getattr(copied, part).set_submodule(inside, plain)
    copied.quantize = "none"
    assert not list(layers(copied))
    return copied


def bits(base: Base) -> dict[str, Tensor]:
    return {f"{part}.{k}": v.clone() for part, module in base.parts() for k, v in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def predict(
    base: Base, prompts: list[str], text: bool = False, live: nn.Module | None = None, side: int | None = None
) -> Tensor:
    side = side or base.unet.config.sample_size
    latents = torch.randn(2, 4, side, side + 8, generator=torch.Generator().manual_seed(6)).to(base.device)
    prediction: Tensor = Denoiser(base, live, text)(latents, torch.tensor([20, 700], device=base.device), prompts)
    return prediction


@pytest.fixture(scope="module", params=KINDS)
def held(request: pytest.FixtureRequest) -> Base:
    return load_base("tiny", quantize=request.param)


def test_linear_layers_and_nothing_else_are_rounded(held: Base, base: Base) -> None:
    was = {f"{part}.{path}": m for part, module in base.parts() for path, m in module.named_modules()}
    rounded = dict(layers(held))
    assert rounded.keys() == {path for path, m in was.items() if type(m) is nn.Linear and not path.startswith("vae")}
    assert len(rounded) == 107
    packed = {f"{path}.weight" for path in rounded}
    now = {f"{part}.{k}": v for part, module in held.parts() for k, v in module.named_parameters()}
    for part, module in base.parts():
        for name, value in module.named_parameters():
            path = f"{part}.{name}"
            assert now[path].is_floating_point() != (path in packed)
            assert path in packed or torch.equal(value, now[path])
    assert held.hash == base.hash
    assert held.generation_hash != base.generation_hash
    assert (held.unet.dtype, held.text_encoder.dtype) == (torch.float32, torch.float32)
    assert f"torch.float32 and {held.quantize} on cpu" in repr(held)


def test_each_weight_is_the_nearest_that_the_bits_can_say(held: Base, base: Base) -> None:
    """In NumPy, from the definitions; the rows' largest are in half precision, and the blocks' themselves in 8 bits."""
    for path, layer in layers(held):
        part, _, inside = path.partition(".")
        weight = getattr(base, part).get_submodule(inside).weight.double().numpy()
        found = layer.dequantized().double().numpy()
        if held.quantize == "int8":
            most = np.abs(weight).max(1, keepdims=True)
            wanted, slack = np.round(weight / most * 127) / 127 * most, most * (0.5 / 127 + 2e-3)
            assert np.abs(found - wanted).max() < most.max() / 127 * 1.01
            assert (np.abs(found - weight) < slack).all()
            continue
        blocks, off = weight.reshape(-1, 64), np.abs(found - weight).reshape(-1, 64)
        most = np.abs(blocks).max(1, keepdims=True)
        nearest = NF4[np.abs((blocks / most)[..., None] - NF4).argmin(-1)] * most
        assert np.abs(found.reshape(-1, 64) - nearest).max() < 0.03 * most.max()
        assert (off < 0.5 * np.diff(NF4).max() * most + 0.03 * most.max()).all()


def test_it_takes_the_memory_that_was_said(held: Base, base: Base) -> None:
    for name, part in base.parts():
        was = bytes_when_quantized(part, "none")
        assert was == sum(value.numel() * value.element_size() for value in part.parameters())
        if name != "vae":
            said = bytes_when_quantized(part, held.quantize)  # type: ignore[arg-type]
            state = getattr(
                held, name
            ).state_dict()  # scales stand there, too, and for each layer what they are read by
            listed = {key: value for key, value in state.items() if not key.endswith(("map", "nf4"))}
            now = sum(value.numel() * value.element_size() for value in listed.values())
            assert now == pytest.approx(said, abs=0.04 * (was - said))
            assert said < 0.97 * was


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_computes_as_the_float_weights_do(kind: Any, precision: str, sdxl_folder: Path) -> None:
    """Stable Diffusion XL, whose layers are of many widths; bit for bit, as the products are the same ones."""
    base = load_base(sdxl_folder, getattr(torch, precision), quantize=kind)
    before = bits(base)
    with torch.no_grad():
        assert torch.equal(predict(base, ["a dog", "a cat"]), predict(whole(base), ["a dog", "a cat"]))
    assert same(bits(base), before)


def recipe(method: str, **more: Any) -> Any:
    lacking = get_method(method).unsupported_under(get_method(method).read_options(more.get("options", {})))
    settings = {"trigger": "<zorp>", "rank": 2, "text_encoder": more.pop("text_encoder", False)}
    settings = {key: value for key, value in settings.items() if key not in lacking}
    return load_recipe(SUBJECT, {"subject": "dog", "method": method, **settings, **more})


def shake(live: Attached) -> None:
    generator = torch.Generator().manual_seed(7)
    for value in live.trainable().values():
        value.data += 0.02 * torch.randn(value.shape, generator=generator)


def gradients(base: Base, plan: Any) -> tuple[Tensor, dict[str, Tensor], Adapter]:
    live = attach(plan, base)
    try:
        shake(live)
        prediction = predict(base, ["a <zorp> dog", "a cat"], plan.text_encoder or live.affects_text_encoder, live)
        prediction.square().mean().backward()
        found = {name: value.grad for name, value in live.trainable().items() if value.grad is not None}
        return prediction.detach(), found, live.adapter({})
    finally:
        live.detach()


WHOLE = ("full", "student")
"""Methods that need the weights of the denoiser as they are"""
PLANS: dict[str, Any] = {name: (name, {"text_encoder": True}) for name in ON_PICTURES if name not in WHOLE}
PLANS["dora"] = ("lora", {"text_encoder": True, "options": {"dora": True}})
PLANS["locon with dora"] = ("locon", {"options": {"dora": True}})
PLANS["pivotal with dora"] = ("pivotal", {"options": {"weights_options": {"dora": True}}})


@pytest.mark.parametrize("name", PLANS)
def test_gradients_flow_through_it_as_through_the_float_weights(held: Base, name: str) -> None:
    """Of every method; those of the text encoder come through all of the UNet. Grafted, it then says the same."""
    method, more = PLANS[name]
    plan, reference = recipe(method, **more), whole(held)
    before = bits(held)
    (found, grads, adapter), (wanted, wanted_grads, _) = (gradients(one, plan) for one in (held, reference))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted_grads.keys() != set()
    for path, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted_grads[path], rtol=1e-4, atol=1e-5 * float(wanted_grads[path].abs().max())
        )
    if plan.text_encoder and method != "textual-inversion":
        assert any(path.startswith("text_encoder.") for path in grads)
    with torch.no_grad():
        bare = predict(held, ["a dog", "a cat"])
        for words, one in ((["a <zorp> dog", "a cat"], held), (["a <zorp> dog", "a cat"], reference)):
            with graft(one, adapter):
                drawn = predict(one, words)
            torch.testing.assert_close(drawn, found, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
        assert torch.equal(predict(held, ["a dog", "a cat"]), bare)
    assert same(bits(held), before)


def lora(plan_seed: int, base: Base, method: str = "lora", **options: Any) -> Adapter:
    live = attach(recipe(method, seed=plan_seed, **({"options": options} if options else {})), base)
    shake(live)
    live.detach()
    return live.adapter({})


def test_grafts_lie_over_one_another_and_come_off_again(held: Base) -> None:
    """As over float weights, to rounding; below the bits stay, and above a DoRA that trains sees what lies there."""
    reference, prompts = whole(held), ["a dog", "a cat"]
    one, other = lora(1, held), lora(2, held, "lokr")
    decomposed = lora(3, held, dora=True)
    before = bits(held)
    with torch.no_grad():
        bare = predict(held, prompts)
        drawn = {}
        for base in (held, reference):
            with graft(base, {one: 0.5, other: -1.0}), graft(base, {decomposed: 0.7}) as over:
                first = predict(base, prompts)
                over.set({other: 0.3})
                drawn[base.quantize] = (first, predict(base, prompts))
        for found, wanted in zip(drawn[held.quantize], drawn["none"], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert (found - bare).abs().max() > 1e-2
        assert torch.equal(predict(held, prompts), bare)
    plan = recipe("lora", options={"dora": True})
    with graft(held, {one: 1.0}), graft(reference, {one: 1.0}):
        (found, _, _), (wanted, _, _) = (gradients(base, plan) for base in (held, reference))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert same(bits(held), before)
    assert not any(layer.changes for _, layer in layers(held))


def test_a_difference_with_biases_and_norms_is_grafted_too(held: Base, base: Base) -> None:
    """Of full fine-tuning: the bias of a quantised layer is changed with its weight, norms are merged as ever."""
    live = attach(recipe("full"), base)
    shake(live)
    adapter = live.adapter({})
    live.detach()
    reference, before = whole(held), bits(held)
    with torch.no_grad(), graft(held, adapter), graft(reference, adapter):
        torch.testing.assert_close(
            predict(held, ["a dog"] * 2), predict(reference, ["a dog"] * 2), rtol=1e-4, atol=1e-5
        )
    assert same(bits(held), before)


def test_nothing_is_kept_for_the_way_back(held: Base) -> None:
    """Neither weight nor input: checkpointing would not get rid of them."""
    layer = held.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    kept: list[Tensor] = []
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    source = x * 2
    gone = weakref.ref(source)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda held: held):
        out = layer(source)
    del source
    gc.collect()
    assert kept == []
    assert gone() is None
    out.square().sum().backward()
    weight, bias = (value.double().numpy() for value in weight_and_bias(layer))
    wanted = 2 * (2 * x.detach().double().numpy() @ weight.T + bias) @ weight * 2
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_autocast_casts_what_it_is_given_and_not_the_base(held: Base) -> None:
    layer = held.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    weight, bias = layer.dequantized(), layer.bias.clone()
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), nn.functional.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, bias)


def test_copies_are_their_own_and_precisions_change(held: Base) -> None:
    with torch.no_grad():
        wanted = predict(held, ["a dog", "a cat"])
        other = copy.deepcopy(held)
        for _, layer in layers(other):
            layer.weight.data.zero_()
        assert not torch.equal(predict(other, ["a dog", "a cat"]), wanted)
        assert torch.equal(predict(held, ["a dog", "a cat"]), wanted)
        half = copy.deepcopy(held).to(dtype=torch.bfloat16)
        assert half.unet.dtype == torch.bfloat16
        for (_, one), (_, layer) in zip(layers(half), layers(held), strict=True):
            assert torch.equal(one.dequantized(), layer.dequantized())
        found = predict(half, ["a dog", "a cat"])
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_few_bits_and_its_continuation(kind: str, pictures: Path, tmp_path: Path) -> None:
    """Its file says so, opens on any base, and one that was stopped goes on to the same bytes."""
    settings: dict[str, Any] = {**SHORT, "steps": 2, "checkpoint_every": 1, "prior": {"weight": 0}, "images": pictures}
    settings |= {"gradient_checkpointing": True, "text_encoder": True, "sample_prompts": "a dog"}
    run = train(SUBJECT, quantize=kind, output=tmp_path / "whole", **settings)
    assert load_adapter(run.adapter_file).metadata["recipe"]["quantize"] == kind
    assert f"quantize: {kind}" in (tmp_path / "whole" / "recipe.yaml").read_text("utf-8")
    part = train(SUBJECT, quantize=kind, output=tmp_path / "part", **{**settings, "steps": 1})
    folder = tmp_path / "part"
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text("utf-8").replace("steps: 1\n", "steps: 2\n"))
    for name in ("adapter.safetensors", "loss.png"):
        (folder / name).unlink()
    again = train(resume=folder)
    assert again.adapter_file.read_bytes() == run.adapter_file.read_bytes()
    assert part.metrics == run.metrics[:1]


def test_a_base_that_was_given_stays_what_it_is(held: Base, base: Base, pictures: Path, tmp_path: Path) -> None:
    """And the recipe of the run says what it was."""
    settings: dict[str, Any] = {
        **SHORT,
        "steps": 1,
        "prior": {"weight": 0},
        "sample_prompts": "a dog",
        "images": pictures,
    }
    other = "nf4" if held.quantize == "int8" else "int8"
    for one in (base, held):
        with pytest.raises(DiffgraftError, match=rf"the recipe has quantize={other}. Load the base with load_base"):
            train(SUBJECT, base=one, quantize=other, output=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    before = bits(held)
    run = train(SUBJECT, base=held, output=tmp_path / "run", **settings)
    assert same(bits(held), before)
    assert run.recipe.quantize == held.quantize
    with pytest.raises(DiffgraftError, match=rf"the recipe has quantize={held.quantize}"):
        train(base=base, resume=tmp_path / "run")


def test_what_needs_the_weights_themselves_is_refused(held: Base, pictures: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "images": pictures, "output": tmp_path / "run", "trigger": "<zorp>"}
    for more in ({"method": "full"}, {"method": "pivotal", "options": {"weights": "full"}}):
        with pytest.raises(DiffgraftError, match="trains the base's own weights, but they are quantised"):
            train(SUBJECT, base=held, **{**settings, **more})
    for name in ("checkpoint", "checkpoint.safetensors"):
        with pytest.raises(DiffgraftError, match=f"quantized to {held.quantize}, and adapters can only be merged"):
            merge_checkpoint(held, {lora(1, held): 1.0}, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_there_is_no_other_kind() -> None:
    with pytest.raises(
        DiffgraftError, match="quantize is not supported by method=full: every weight trains, which quantised"
    ):
        recipe("full", quantize="nf4")
    assert recipe("full", quantize="none").quantize == "none"
    with pytest.raises(DiffgraftError, match="quantize='nf8': did you mean 'nf4'"):
        load_base("tiny", quantize="nf8")  # type: ignore[arg-type]
