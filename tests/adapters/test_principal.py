"""PiSSA and OLoRA, held to peft, which changes the base's weights instead."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.method import Attached, Spec
from diffgraft.adapters.registry import get_method
from diffgraft.errors import DiffgraftError
from tests.adapters.toys import deltas_of

RANK, ALPHA = 4, 6.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide, self.small = nn.Linear(14, 22), nn.Linear(22, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.small(self.wide(x).sin())
        return y


def attached(net: nn.Module, init: str, **more: Any) -> Attached:
    method = get_method("lora")
    spec = Spec({"unet": ["wide"]}, RANK, ALPHA, 0, method.read_options({"init": init, **more}))
    return method.attach(SimpleNamespace(unet=net), spec)


def seeded_svd(*given: Any, **named: Any) -> Any:
    """The randomized SVD with the random matrix that ours has."""
    torch.manual_seed(0)
    return torch.svd_lowrank(*given, **named)


@pytest.mark.parametrize(("init", "niter"), [("pissa", 0), ("pissa", 3), ("olora", 0)])
def test_steps_are_those_of_peft(init: str, niter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs before and after ten steps of Adam, from peft's own initial factors up to their signs."""
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded_svd)
    by = f"pissa_niter_{niter}" if niter else init
    x, goal = torch.randn(9, 14), torch.randn(9, 3)
    theirs = get_peft_model(Net(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["wide"], init_lora_weights=by))
    ours = Net().requires_grad_(False)
    live = attached(ours, init, pissa_niter=niter)
    found = dict(live.trainable())
    layer = theirs.base_model.model.wide
    wanted = {"lora_down": layer.lora_A.default.weight, "lora_up": layer.lora_B.default.weight}
    for name, value in wanted.items():
        torch.testing.assert_close(found[f"unet.wide.{name}"].abs(), value.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), Net()(x))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for net, values in ((ours, list(found.values())), (theirs, list(wanted.values()))):
        adam = torch.optim.Adam(values, lr=3e-2)
        for _ in range(10):
            adam.zero_grad()
            (net(x) - goal).square().mean().backward()
            adam.step()
    after = ours(x)
    assert (after - Net()(x)).abs().max() > 0.1
    torch.testing.assert_close(after, theirs(x), rtol=1e-3, atol=1e-4)
    (delta,) = deltas_of(live).values()
    live.detach()
    bare = Net()
    with torch.no_grad():
        bare.wide.weight.copy_(delta.apply(bare.wide.weight, None, 1.0)[0])
    torch.testing.assert_close(bare(x), after, rtol=1e-4, atol=1e-5)
    assert delta.leaves["lora_down"].shape[0] == 2 * RANK


def test_training_goes_on_from_a_file_of_the_same_start_alone() -> None:
    net = Net().requires_grad_(False)
    first = attached(net, "pissa")
    with torch.no_grad():
        for value in first.trainable().values():
            value.add_(0.1)
    adapter = Adapter({path: (delta,) for path, delta in deltas_of(first).items()})
    first.detach()
    again = attached(net, "pissa")
    assert again.load(adapter) == {"unet.wide"}
    for name, value in again.trainable().items():
        torch.testing.assert_close(value, first.trainable()[name])
    again.detach()
    half = Adapter({path: (stored(delta, torch.bfloat16),) for path, (delta,) in adapter.deltas.items()})
    once_more = attached(net, "pissa")
    assert once_more.load(half) == {"unet.wide"}
    once_more.detach()
    other = attached(net, "olora")
    with pytest.raises(ValueError, match=r"with the same options\.init"):
        other.load(adapter)
    other.detach()


def stored(delta: Delta, dtype: torch.dtype) -> Delta:
    """The delta as a file of this dtype has it, with the signs of its singular vectors the other way round."""
    assert isinstance(delta, FactorDelta)
    signs = torch.ones(2 * RANK)
    signs[:: RANK + 1] = -1
    leaves = {
        "lora_up": (delta.leaves["lora_up"] * signs).to(dtype),
        "lora_down": (delta.leaves["lora_down"] * signs[:, None]).to(dtype),
    }
    return replace(delta, leaves=leaves)


def test_the_scale_of_a_file_is_kept() -> None:
    net = Net().requires_grad_(False)
    first = attached(net, "olora", alphas={"*": 12.0})
    with torch.no_grad():
        for value in first.trainable().values():
            value.add_(0.1)
    wanted = net(torch.ones(2, 14))
    adapter = Adapter({path: (delta,) for path, delta in deltas_of(first).items()})
    first.detach()
    again = attached(net, "olora")
    again.load(adapter)
    torch.testing.assert_close(net(torch.ones(2, 14)), wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_small_updates_survive_half_precision(init: str) -> None:
    net, x = Net().requires_grad_(False), torch.randn(9, 14)
    live = attached(net, init)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in live.trainable().values():
            value.add_(1e-4 * torch.randn(value.shape, generator=generator))
    layer = live.adapter_layers()["unet.wide"]  # type: ignore[operator]
    exact = layer.contribution(net.wide, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.contribution(net.wide, x)
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_a_randomized_start_is_a_function_of_the_weight() -> None:
    """So that a resumed run and a file go on from it; with many iterations it is the exact one."""
    net = Net().requires_grad_(False)
    starts, state = [], torch.get_rng_state()
    for niter in (2, 2, 40, 0):
        live = attached(net, "pissa", pissa_niter=niter)
        starts.append(live.trainable()["unet.wide.lora_up"] @ live.trainable()["unet.wide.lora_down"])
        live.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[0], starts[1])
    assert (starts[2] - starts[3]).norm() < 1e-2 * starts[3].norm() < (starts[0] - starts[3]).norm()


def test_what_cannot_start_so_is_refused() -> None:
    with pytest.raises(DiffgraftError, match=r"options\.pissa_niter has no effect without options\.init=pissa"):
        attached(Net(), "olora", pissa_niter=4)
    with pytest.raises(DiffgraftError, match=r"options\.init=pissa cannot be combined with options\.dora=true"):
        attached(Net(), "pissa", dora=True)
