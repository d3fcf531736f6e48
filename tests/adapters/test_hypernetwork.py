"""Hypernetworks: the webui's formula, chains of them, beside weights, and in files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter, native
from diffgraft.adapters.method import Spec
from diffgraft.adapters.methods.hypernetwork import (
    AttachedHypernetwork,
    ContextNetwork,
    Hypernetwork,
    HypernetworkOptions,
    context_projections,
)
from diffgraft.adapters.registry import get_method
from diffgraft.bases import Base, load_base
from diffgraft.bases.unet import unet_arguments
from diffgraft.errors import DiffgraftError
from diffgraft.files import write_safetensors
from diffgraft.generation.graft import graft
from tests.adapters.toys import shake


class Attention(nn.Module):
    """What there is of an attention for a hypernetwork: the projections to keys and values."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(width, out, bias=False), nn.Linear(width, out, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        return torch.cat([self.to_k(context), self.to_v(context)], -1)


def unet() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"self": Attention(12, 8), "cross": Attention(10, 14), "other": Attention(12, 6)})


def attach(target: Any, seed: int = 0, **options: Any) -> AttachedHypernetwork:
    method = get_method("hypernetwork")
    live = method.attach(target, Spec({}, 1, 1.0, seed, method.read_options(options)))
    assert isinstance(live, AttachedHypernetwork)
    return live


ACTIVATION = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu", "structure": [1, 1.5, 2, 1]},
        {"activation": "swish", "activate_output": True},
        {"activation": "tanh", "layer_norm": True},
    ],
)
def test_the_formula_in_float64(options: dict[str, Any], strength: float) -> None:
    net = unet()
    live = attach(SimpleNamespace(unet=net), **options)
    shake(live, size=0.2)
    tensors = {name: value.double().numpy() for name, value in live.adapter({}).networks[0].tensors.items()}
    adapter = live.adapter({})
    live.detach()
    structure = options.get("structure", [1, 2, 1])
    act = ACTIVATION[options.get("activation", "linear")]

    def f(name: str, x: np.ndarray) -> np.ndarray:
        place = 0
        for layer in range(len(structure) - 1):
            x = x @ tensors[f"{name}.linear.{place}.weight"].T + tensors[f"{name}.linear.{place}.bias"]
            place += 1
            if options.get("activation") and (layer < len(structure) - 2 or options.get("activate_output")):
                x, place = act(x), place + 1
            if options.get("layer_norm"):
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
                x = x * tensors[f"{name}.linear.{place}.weight"] + tensors[f"{name}.linear.{place}.bias"]
                place += 1
        return x

    for key, width in (("self", 12), ("cross", 10), ("other", 12)):
        layer = net[key]
        assert isinstance(layer, Attention)
        context = torch.randn(2, 5, width)
        c = context.double().numpy()
        wanted = [
            (c + strength * f(f"{width}-{keys}", c)) @ projection.weight.detach().double().numpy().T
            for keys, projection in (("k", layer.to_k), ("v", layer.to_v))
        ]
        with graft(SimpleNamespace(unet=net), {adapter: strength}):
            found = layer(context).detach().numpy()
        np.testing.assert_allclose(found, np.concatenate(wanted, -1), rtol=1e-4, atol=1e-5)


def test_attached_is_grafted_and_a_fresh_one_is_near_the_base(base: Base) -> None:
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([300, 700])
    told = unet_arguments(base.condition(["a dog", "a cat"]))

    @torch.no_grad()
    def said() -> Tensor:
        found: Tensor = base.unet(x, t, **told).sample
        return found

    bare = said()
    live = attach(base)
    assert set(context_projections(base.unet)) == {64, 128}
    assert len(live.trainable()) == 2 * 2 * 4
    assert 0 < (said() - bare).norm() < 0.02 * bare.norm()
    shake(live, size=0.05)
    wanted, adapter = said(), live.adapter({})
    live.detach()
    assert torch.equal(said(), bare)
    assert (wanted - bare).norm() > 0.02 * bare.norm()
    with graft(base, {adapter: 1.0}):
        torch.testing.assert_close(said(), wanted)
    with graft(base, {adapter: 0}):
        assert torch.equal(said(), bare)
    assert torch.equal(said(), bare)


def test_a_second_sees_what_the_first_made_and_both_stack_with_lora(base: Base) -> None:
    net = unet()
    target = SimpleNamespace(unet=net)
    adapters = []
    for seed in (1, 2):
        live = attach(target, seed)
        shake(live, seed, size=0.2)
        adapters.append(live.adapter({}))
        live.detach()
    method = get_method("lora")
    live_lora = method.attach(target, Spec({"unet": ["cross.to_k"]}, 2, 3.0, 0, method.read_options({})))
    shake(live_lora)
    lora = live_lora.adapter({})
    live_lora.detach()
    layer = net["cross"]
    assert isinstance(layer, Attention)
    c = torch.randn(2, 5, 10)
    first, second = (adapter.networks[0].build() for adapter in adapters)  # type: ignore[attr-defined]
    inner = c + 0.5 * first["10-k"](c)
    inner = inner + 2 * second["10-k"](inner)
    (delta,) = lora.deltas["unet.cross.to_k"]
    wanted = inner @ (layer.to_k.weight + delta.delta((14, 10))).T  # type: ignore[attr-defined]
    with graft(target, {adapters[0]: 0.5, lora: 1.0, adapters[1]: 2.0}):
        torch.testing.assert_close(layer.to_k(c), wanted)
    assert base.name == "tiny"


def test_files_hold_it_and_say_what_does_not_fit(base: Base, tmp_path: Path) -> None:
    live = attach(SimpleNamespace(unet=unet()), structure=[1, 1.5, 1], activation="mish", dropout=[0, 0.3, 0])
    shake(live)
    adapter = live.adapter({"method": "hypernetwork"})
    again = load_adapter(adapter.save(tmp_path / "a.safetensors"))
    assert again.networks[0].settings == adapter.networks[0].settings
    for name, value in adapter.networks[0].tensors.items():
        assert torch.equal(again.networks[0].tensors[name], value)
    with pytest.raises(DiffgraftError, match=r"contexts of width \[10, 12\], but this base has \[64, 128\]"):
        graft(base, {again: 1.0})
    with pytest.raises(DiffgraftError, match="which such files cannot hold"):
        adapter.save(tmp_path / "b.safetensors", "diffusers")
    (network,) = adapter.networks
    broken = type(network)(network.tensors, {**network.settings, "structure": [1, 3, 1]})  # type: ignore[call-arg]
    with pytest.raises(
        DiffgraftError, match=r"cannot read again: .* other shapes than layer_structure=\[1.0, 3.0, 1.0\]"
    ):
        Adapter({}, {}, (broken,)).save(tmp_path / "c.safetensors")
    write_safetensors(tmp_path / "c.safetensors", *native.write(Adapter({}, {}, (broken,))))
    with pytest.raises(DiffgraftError, match=r"other shapes than layer_structure=\[1.0, 3.0, 1.0\]"):
        load_adapter(tmp_path / "c.safetensors")
    with pytest.raises(DiffgraftError, match="the first and the last are 1"):
        attach(base, structure=[1, 2])


def test_a_structure_of_vast_layers_is_refused_before_any_is_made(tmp_path: Path) -> None:
    """Two megabytes that stand for petabytes."""
    tensors = {"999000-k.linear.0.weight": torch.ones(1, 999_000).half(), "999000-k.linear.0.bias": torch.ones(1)}
    settings = {**HypernetworkOptions().model_dump(), "structure": [1, 64, 64, 1]}
    vast = Adapter({}, {}, (Hypernetwork(tensors, settings),))
    write_safetensors(tmp_path / "vast.safetensors", *native.write(vast))
    with pytest.raises(DiffgraftError, match=r"other shapes than layer_structure=\[1.0, 64.0, 64.0, 1.0\]"):
        load_adapter(tmp_path / "vast.safetensors")


@pytest.mark.parametrize("width", ["9", "1000000000", "²"])
def test_a_width_that_its_first_layer_does_not_have_is_refused(width: str, tmp_path: Path) -> None:
    layers = {"linear.0.weight": torch.ones(24, 12), "linear.0.bias": torch.ones(24)}
    layers |= {"linear.1.weight": torch.ones(12, 24), "linear.1.bias": torch.ones(12)}
    tensors = {f"{width}-k.{name}": value for name, value in layers.items()}
    odd = Adapter({}, {}, (Hypernetwork(tensors, HypernetworkOptions().model_dump()),))
    write_safetensors(tmp_path / "odd.safetensors", *native.write(odd))
    with pytest.raises(DiffgraftError, match=f"its network {width}-k (has no first layer|takes contexts of width 12)"):
        load_adapter(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("options", [{}, {"structure": [1, 1.5, 2, 1]}, {"structure": [1, 1]}])
def test_layers_with_nothing_between_are_one_matrix(options: dict[str, Any]) -> None:
    live = attach(SimpleNamespace(unet=unet()), **options)
    shake(live, size=0.2)
    for network in live.networks.values():
        weight, bias = network.double().fused()  # type: ignore[operator, union-attr]
        x = torch.randn(5, weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(nn.functional.linear(x, weight, bias), network(x))


def test_the_one_matrix_is_taken_where_it_is_less_to_compute() -> None:
    def network(**options: Any) -> ContextNetwork:
        return ContextNetwork(12, HypernetworkOptions.model_validate(options))

    # 2 · 12² · 12 to make and 12² a token to use, against 4 · 12² a token
    assert network().is_cheaper_fused(9)
    assert not network().is_cheaper_fused(8)
    assert not network(structure=[1, 1]).is_cheaper_fused(1000)
    assert not network(activation="relu").is_cheaper_fused(1000)
    assert not network(layer_norm=True).is_cheaper_fused(1000)
    dropping = network(dropout=[0, 0.3, 0])
    assert not dropping.is_cheaper_fused(1000)
    assert dropping.eval().is_cheaper_fused(1000)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}])
def test_what_is_worked_out_once_is_what_each_attention_would_work_out(
    options: dict[str, Any], checkpointed: bool
) -> None:
    """On a real UNet, forward and gradients, against the formula hooked before each projection by itself."""
    base = load_base("tiny")
    x, text = torch.randn(2, 4, 16, 12), torch.randn(2, 7, 64)

    def run(live: AttachedHypernetwork) -> tuple[Tensor, list[Tensor]]:
        out = base.unet(x, torch.tensor([3, 700]), encoder_hidden_states=text).sample
        return out.detach(), list(torch.autograd.grad(out.square().sum(), list(live.networks.parameters())))

    live = attach(base, **options)
    shake(live, size=0.05)
    if checkpointed:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    fast, fast_gradients = run(live)
    live.detach()

    def before(network: nn.Module) -> Any:
        return lambda _, args: (args[0] + network(args[0]), *args[1:])

    for width, projections in context_projections(base.unet).items():
        for keys, projection in projections:
            projection.register_forward_pre_hook(before(live.networks[f"{width}-{keys}"]))
    slow, slow_gradients = run(live)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    one, other = (torch.cat([value.flatten() for value in found]) for found in (fast_gradients, slow_gradients))
    assert float((one - other).norm() / other.norm()) < 1e-5


def test_the_text_is_asked_once_a_pass_however_many_attentions_there_are() -> None:
    base = load_base("tiny")
    live = attach(base, activation="relu")
    calls: list[int] = []
    for network in live.networks.values():
        network.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    base.unet(torch.randn(1, 4, 16, 12), torch.tensor(3), encoder_hidden_states=torch.randn(1, 7, 64))
    attentions = sum(1 for width, found in context_projections(base.unet).items() if width == 64 for _ in found) // 2
    assert attentions > 2
    assert calls.count(7) == 2


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}])
def test_several_passes_before_one_way_back(options: dict[str, Any], checkpointed: bool) -> None:
    """With one in between that makes no gradients; against the same passes, each with a way back of its own."""
    base = load_base("tiny")
    live = attach(base, **options)
    shake(live, size=0.05)
    if checkpointed:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    told = [(torch.randn(1, 4, 16, 12), torch.randn(1, 7, 64)) for _ in range(2)]

    def loss(place: int) -> Tensor:
        x, text = told[place]
        out: Tensor = base.unet(x, torch.tensor(500), encoder_hidden_states=text).sample
        return out.square().sum()

    parameters = list(live.networks.parameters())
    apart = [torch.autograd.grad(loss(place), parameters) for place in (0, 1)]
    total = loss(0)
    with torch.no_grad():
        loss(1)
    total = total + loss(1)
    together = torch.autograd.grad(total, parameters)
    found, first, second = (torch.cat([value.flatten() for value in each]) for each in (together, *apart))
    assert float((found - first - second).norm() / found.norm()) < 1e-5


@pytest.mark.parametrize("options", [{"dropout": [0.3]}, {"dropout": [0, 1.5, 0]}, {"structure": [1, 2]}])
def test_options_that_make_no_network_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DiffgraftError, match="Invalid value"):
        get_method("hypernetwork").read_options(options)


def test_a_strength_means_the_same_where_the_network_is_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("tiny")
    live = attach(base)
    shake(live, size=0.05)
    adapter = live.adapter({})
    live.detach()
    x, text = torch.randn(2, 4, 16, 12), torch.randn(2, 7, 64)

    @torch.no_grad()
    def said() -> Tensor:
        with graft(base, {adapter: 0.4}):
            found: Tensor = base.unet(x, torch.tensor([3, 700]), encoder_hidden_states=text).sample
        return found

    fused = said()
    monkeypatch.setattr(ContextNetwork, "is_cheaper_fused", lambda *_: False)
    torch.testing.assert_close(fused, said(), rtol=1e-4, atol=1e-5)
