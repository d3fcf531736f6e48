"""Kinds of deltas that depend on the weight, held to the modules of LyCORIS that make them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lycoris.functional.general import power2factorization
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.boft import butterfly_blocks
from diffgraft.adapters.patch import run_layer
from diffgraft.adapters.registry import get_method, read_delta
from diffgraft.errors import DiffgraftError

LAYERS = {
    "linear": lambda: nn.Linear(10, 32),
    "1x1": lambda: nn.Conv2d(10, 32, 1),
    "3x3": lambda: nn.Conv2d(10, 32, 3, padding=1, stride=2),
}
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "ia3": (IA3Module, {}),
    "ia3, inputs": (IA3Module, {"train_on_input": True}),
    "glora": (GLoRAModule, {"lora_dim": 3, "alpha": 2}),
    "oft": (DiagOFTModule, {"lora_dim": 4}),
    "oft, bound, rescaled": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
    "boft": (ButterflyOFTModule, {"lora_dim": 4}),
    "boft, bound, rescaled": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
}


def made(name: str, layer: nn.Module) -> Any:
    """LyCORIS' module on a layer, with everything in it random."""
    kind, options = MADE[name]
    module = kind("lora_unet_mid_block_attentions_0_proj_in", layer, 1.0, **options)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return module


def ours(name: str, module: Any) -> Delta:
    """The same, as we read it."""
    leaves = {key.removesuffix(".weight"): value.detach().clone() for key, value in module.state_dict().items()}
    leaves = {key or "weight": value for key, value in leaves.items()}
    alpha = leaves.pop("alpha", None)
    leaves.pop("scalar", None)
    return read_delta(name.partition(",")[0], leaves, None if alpha is None else float(alpha))


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MADE)
def test_what_they_make_of_a_weight_is_what_lycoris_makes(name: str, layer: str, strength: float) -> None:
    torch.manual_seed(3)
    held = LAYERS[layer]()
    module = made(name, held)
    delta = ours(name, module)
    assert delta.kind == name.partition(",")[0]
    weight: Tensor = held.weight.detach()  # type: ignore[assignment]
    assert delta.fits(tuple(weight.shape))
    assert not delta.fits(tuple(weight.shape[:1]))
    assert not delta.fits((weight.shape[0] + 4, weight.shape[1] + 2, *weight.shape[2:]))
    found, bias = delta.apply(weight, held.bias, strength)  # type: ignore[arg-type]
    wanted = module.get_merged_weight(strength)[0].detach().view(weight.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found - weight).abs().max() > 0.01 * abs(strength)
    assert bias is held.bias
    torch.testing.assert_close(delta.apply(weight, None, 0.0)[0] / weight, _at_zero(delta, weight))


def _at_zero(delta: Delta, weight: Tensor) -> Tensor:
    """At strength 0 only LyCORIS' rescaling is left, which it does not scale."""
    one = torch.ones_like(weight)
    return one * delta.leaves["rescale"] if "rescale" in delta.leaves else one


def test_glora_from_before_may_2024() -> None:
    """W · a2 · a1 + b2 · b1, with today's names the other way round."""
    torch.manual_seed(3)
    a1, a2, b1, b2 = torch.randn(3, 10), torch.randn(10, 3), torch.randn(3, 10), torch.randn(24, 3)
    delta = read_delta("glora", {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, 6.0)
    weight = torch.randn(24, 10)
    torch.testing.assert_close(delta.apply(weight, None, 0.5)[0], weight + 0.5 * 2 * (weight @ a2 @ a1 + b2 @ b1))
    square = {"a1": a1, "a2": a2, "b1": b1, "b2": torch.randn(10, 3)}
    weight = torch.randn(10, 10)
    wanted = weight + weight @ a2 @ a1 + square["b2"] @ b1
    torch.testing.assert_close(read_delta("glora", square, 3.0).apply(weight, None, 1.0)[0], wanted)


@pytest.mark.parametrize("name", MADE)
def test_files_of_lycoris_are_read_and_written_again(name: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    module = made(name, nn.Linear(10, 32))
    start = module.lora_name
    tensors = {f"{start}.{key}": value.clone() for key, value in module.state_dict().items() if key != "scalar"}
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter = load_adapter(tmp_path / "theirs.safetensors")
    assert adapter.modules == ["unet.mid_block.attentions.0.proj_in"]
    adapter.save(tmp_path / "ours.safetensors", format="lycoris")
    again = load_file(tmp_path / "ours.safetensors")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], value.to(again[key].dtype)) for key, value in tensors.items())
    adapter.save(tmp_path / "native.safetensors", format="diffgraft")
    assert load_adapter(tmp_path / "native.safetensors").deltas.keys() == adapter.deltas.keys()


@pytest.mark.parametrize(
    ("kind", "leaves", "answer"),
    [
        ("ia3", {"weight": torch.ones(2, 3)}, "expected one factor per input or output"),
        ("ia3", {"weight": torch.ones(3), "on_input": torch.ones(2)}, "expected a single number"),
        ("glora", {"a1": torch.ones(4, 2), "a2": torch.ones(2, 4), "b1": torch.ones(5, 3)}, "are not the factors"),
        (
            "glora",
            {"a1": torch.ones(4, 2), "a2": torch.ones(2, 4), "b1": torch.ones(5, 2), "b2": torch.ones(3, 4)},
            "b2 ",
        ),
        ("oft", {"oft_blocks": torch.ones(2, 3, 4)}, "expected square blocks"),
        ("boft", {"oft_blocks": torch.ones(2, 3, 5, 5)}, "an even size"),
        ("oft", {"oft_blocks": torch.ones(2, 3, 3), "more": torch.ones(1)}, "are not the leaves"),
        ("ofd", {}, "unknown kind 'ofd'"),
    ],
)
def test_what_does_not_fit_is_told(kind: str, leaves: dict[str, Tensor], answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        read_delta(kind, leaves, 1.0)


TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("ia3", {}),
    "ia3, inputs": ("ia3", {"on_input": ["*"]}),
    "glora": ("glora", {}),
    "oft": ("oft", {}),
    "oft, bound, rescaled": ("oft", {"constraint": 0.02, "rescaled": True}),
    "boft": ("boft", {}),
    "boft, bound, rescaled": ("boft", {"constraint": 0.02, "rescaled": True}),
}
"""Those of `MADE` → the method that trains them, and its options."""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MADE)
def test_training_is_that_of_lycoris(name: str, layer: str) -> None:
    """Outputs and gradients of the live layer, from the same values; also the shapes of what is trained."""
    torch.manual_seed(3)
    held = LAYERS[layer]().requires_grad_(False)
    module = made(name, held)
    method, options = TRAINED[name]
    chosen = get_method(method)
    rank, alpha = (3, 2.0) if method == "glora" else (4, 4.0)
    net = nn.Module()
    net.proj = held
    live = chosen.attach(
        SimpleNamespace(unet=net), Spec({"unet": ["proj"]}, rank, alpha, 0, chosen.read_options(options))
    )
    fresh = {key: tuple(value.shape) for key, value in live.trainable().items()}
    live.load(Adapter({"unet.proj": (ours(name, module),)}))
    assert {key: tuple(value.shape) for key, value in live.trainable().items()} == fresh
    x = torch.randn((5, 10) if layer == "linear" else (5, 10, 7, 9))
    found = held(x)
    found.square().mean().backward()
    live.detach()
    module.train()
    weight, bias = module.get_merged_weight(1.0)[0], held.bias
    wanted = run_layer(held, x, weight.view(held.weight.shape)) + bias.view(-1, *[1] * (x.ndim - 2))
    wanted.square().mean().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    theirs = {key.removesuffix(".weight") or "weight": value.grad for key, value in module.named_parameters()}
    trained = {key.removeprefix("unet.proj."): value.grad for key, value in live.trainable().items()}
    assert len(trained) == len([value for value in theirs.values() if value is not None])
    for key, gradient in trained.items():
        assert gradient is not None
        assert (gradient - theirs[key]).norm() < 1e-4 * theirs[key].norm(), key
        assert gradient.norm() > 0


def test_blocks_of_boft_are_those_of_lycoris_where_it_has_any() -> None:
    for out in range(2, 200, 2):
        for side in (2, 4, 8, 32, 50):
            theirs = power2factorization(out, side)
            stages, count, own = butterfly_blocks(out, side)
            assert own * count == out
            if theirs[1]:
                assert (own, count) == theirs
                assert stages == sum(int(digit) for digit in f"{count - 1:b}") + 1
            else:
                assert own > side
    with pytest.raises(ValueError, match="blocks of an even size"):
        butterfly_blocks(15, 4)


@pytest.mark.parametrize("name", ["ia3", "oft, bound, rescaled", "boft"])
def test_small_changes_survive_half_precision(name: str) -> None:
    """And without any change every bit of the output is that of the base."""
    method, options = TRAINED[name]
    chosen = get_method(method)
    net = nn.Module()
    torch.manual_seed(3)
    net.proj = nn.Linear(10, 32).bfloat16().requires_grad_(False)
    x = torch.randn(50, 10).bfloat16()
    bare = net.proj(x)
    live = chosen.attach(SimpleNamespace(unet=net), Spec({"unet": ["proj"]}, 4, 4.0, 0, chosen.read_options(options)))
    assert torch.equal(net.proj(x), bare)
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(3e-2 * torch.randn(value.shape))
    found = (net.proj(x) - bare).float()
    (delta,) = (delta for (delta,) in live.adapter({}).deltas.values())
    weight = net.proj.weight.float()
    wanted = run_layer(net.proj, x.float(), delta.apply(weight, None, 1.0)[0] - weight)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_the_rank_of_glora_is_at_most_the_number_of_inputs() -> None:
    net = nn.Module()
    net.proj = nn.Linear(8, 8).requires_grad_(False)
    chosen = get_method("glora")
    live = chosen.attach(SimpleNamespace(unet=net), Spec({"unet": ["proj"]}, 16, 16.0, 0, chosen.read_options({})))
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(0.1 * torch.randn(value.shape))
    x = torch.randn(5, 8)
    found = net.proj(x)
    ((delta,),) = live.adapter({}).deltas.values()
    live.detach()
    assert delta.fits((8, 8))
    torch.testing.assert_close(
        run_layer(net.proj, x, delta.apply(net.proj.weight, None, 1.0)[0]) + net.proj.bias, found
    )


def test_patterns_of_inputs_that_match_nothing_are_refused() -> None:
    net = nn.Module()
    net.proj = nn.Linear(8, 12)
    chosen = get_method("ia3")
    spec = Spec({"unet": ["proj"]}, 4, 4.0, 0, chosen.read_options({"on_input": ["*.prj"]}))
    with pytest.raises(DiffgraftError, match=r"options\.on_input"):
        chosen.attach(SimpleNamespace(unet=net), spec)


def test_blocks_of_one_are_refused() -> None:
    net = nn.Module()
    net.proj = nn.Linear(8, 12)
    chosen = get_method("oft")
    with pytest.raises(DiffgraftError, match=r"with rank=1 its 12 outputs are blocks of one"):
        chosen.attach(SimpleNamespace(unet=net), Spec({"unet": ["proj"]}, 1, 1.0, 0, chosen.read_options({})))
