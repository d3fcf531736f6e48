"""LoRAs beside large layers: the outputs of merging, and nothing of it afterwards."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.lora import LOW_RANK
from diffgraft.bases import Base
from diffgraft.generation import beside
from diffgraft.generation.graft import Graft, has_other_grafts
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings
from tests.generation.test_lanes import made
from tests.generation.test_session import bits, pixels, same


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer counts as large."""
    monkeypatch.setattr(beside, "_LEAST", 1)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_give_what_merged_weights_give(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (nn.Linear(7, 5), torch.randn(2, 3, 7)),
        (nn.Linear(7, 5, bias=False), torch.randn(2, 7)),
        (nn.Conv2d(3, 5, (3, 2), stride=2, padding=1), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 1), torch.randn(1, 3, 4, 6)),
    ]
    for layer, x in layers:
        layer, x = layer.to(dtype), x.to(dtype)
        shape = tuple(layer.get_parameter("weight").shape)
        deltas = []
        for rank, strength in ((2, 0.7), (3, -0.4)):
            down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
            deltas.append((FactorDelta(LOW_RANK, {"lora_down": down, "lora_up": up}, 1.0), strength))
        factors = beside.thin_factors(layer, deltas)
        assert factors is not None
        weight = layer.get_parameter("weight").detach().clone()
        plain = layer(x)
        remove = beside.lay_beside(layer, *factors)
        found, whole = layer(x), beside.whole_weight(layer)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), found)
        remove()
        assert torch.equal(layer(x), plain)
        wanted = weight.float()
        for delta, strength in deltas:
            wanted, _ = delta.apply(wanted, None, strength)
        torch.testing.assert_close(whole, wanted)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(wanted)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("all_large")
def test_what_is_no_lora_is_merged(base: Base) -> None:
    layer = base.unet.get_submodule("mid_block.attentions.0.proj_in")
    lora = made(base, "locon", 1).deltas["unet.mid_block.attentions.0.proj_in"][0]
    assert beside.thin_factors(layer, [(lora, 1.0)]) is not None
    dora = made(base, "locon", 1, dora=True).deltas["unet.mid_block.attentions.0.proj_in"][0]
    assert beside.thin_factors(layer, [(lora, 1.0), (dora, 1.0)]) is None
    assert beside.thin_factors(layer, [(lora, float("inf"))]) is None
    assert beside.thin_factors(nn.LayerNorm(300), [(lora, 1.0)]) is None
    with torch.device("meta"):
        assert beside.thin_factors(nn.Linear(300, 300), [(lora, 1.0)]) is None


def test_small_layers_are_merged() -> None:
    down, up = torch.randn(2, 256), torch.randn(255, 2)
    delta = FactorDelta(LOW_RANK, {"lora_down": down, "lora_up": up}, 1.0)
    assert beside.thin_factors(nn.Linear(256, 255), [(delta, 1.0)]) is None
    assert beside.thin_factors(nn.Linear(256, 256), [(replace(delta, leaves={**delta.leaves, "lora_up": up}), 1.0)])


def test_a_session_draws_the_same_either_way(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a DoRA on the same layers, which is merged on top of the LoRA."""
    first, second, third = made(base, "locon", 1), made(base, "lora", 2, dora=True), made(base, "loha", 3)
    before, drawn = bits(base), {}
    settings = DrawSettings(steps=3)
    for least in (1, 10**9):
        monkeypatch.setattr(beside, "_LEAST", least)
        with Session(base) as session:
            for name, adapter in (("a", first), ("b", second), ("c", third)):
                session.use(adapter, 0.8, name)
            drawn[least, "all"] = pixels(session.draw("a dog", [1], settings))
            session.remove("b")
            session.use(first, 0.3, "a")
            drawn[least, "two"] = pixels(session.draw("a dog", [1], settings))
            assert has_other_grafts(base, Graft(base))
        assert same(bits(base), before)
        assert not has_other_grafts(base, Graft(base))
        drawn[least, "none"] = pixels(Session(base).draw("a dog", [1], settings))
    for name in ("all", "two", "none"):
        assert abs(drawn[1, name] - drawn[10**9, name]).max() <= (0 if name == "none" else 2), name
    assert abs(drawn[1, "all"] - drawn[1, "two"]).max() > 2


@pytest.mark.usefixtures("all_large")
def test_an_adapter_with_one_layer_changed_in_strength(base: Base) -> None:
    adapter: Adapter = made(base, "lora", 1)
    path = next(iter(adapter.deltas))
    graft = Graft(base, beside=True)
    one = replace(adapter, deltas={path: adapter.deltas[path]})
    graft.set({adapter: 0.5})
    graft.set({adapter: 0.5, one: 1.0})
    graft.set({one: 1.0})
    assert has_other_grafts(base, Graft(base))
    graft.remove()
    assert not has_other_grafts(base, Graft(base))
