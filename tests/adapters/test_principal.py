"""PiSSA and OLoRA, held to peft, which changes the base's weights instead."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from diffgraft.adapters.adapter import Adapter
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


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_steps_are_those_of_peft(init: str) -> None:
    """The same outputs before and after ten steps of Adam, from peft's own initial factors up to their signs."""
    x, goal = torch.randn(9, 14), torch.randn(9, 3)
    theirs = get_peft_model(
        Net(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["wide"], init_lora_weights=init)
    )
    ours = Net().requires_grad_(False)
    live = attached(ours, init)
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
    other = attached(net, "olora")
    with pytest.raises(ValueError, match=r"with the same options\.init and rank"):
        other.load(adapter)
    other.detach()


def test_what_cannot_start_so_is_refused() -> None:
    with pytest.raises(DiffgraftError, match=r"options\.init=pissa cannot be combined with options\.dora=true"):
        attached(Net(), "pissa", dora=True)
