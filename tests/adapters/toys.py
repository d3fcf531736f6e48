"""What the tests of methods share: a net of every kind of layer, and every method with its options."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.registry import get_method, methods


class Net(nn.Module):
    """A linear layer, and convolutions of 1 × 1, of 3 × 3, strided and grouped; no two widths are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = nn.Conv2d(6, 10, 3, padding=1)
        self.narrow = nn.Conv2d(10, 14, 1, bias=False)
        self.strided = nn.Conv2d(14, 12, 3, stride=2, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(12, 18, (3, 1), groups=3, dilation=(1, 2))
        self.out = nn.Linear(18, 22)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.grouped(self.strided(self.narrow(self.wide(x)))).mean((2, 3)))
        return y


PATHS = ["wide", "narrow", "strided", "grouped", "out"]

_MORE: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rslora": True, "ranks": {"*.out": 5}, "alphas": {"unet.w*": 7}},
        {"dora": True},
        {"init": "pissa"},
        {"init": "olora"},
    ],
    "locon": [{"conv_rank": 2, "conv_alpha": 1}, {"tucker": True}, {"tucker": True, "dora": True}],
    "loha": [
        {"conv_rank": 2, "ranks": {"*.out": 4, "unet.narrow": 1}, "alphas": {"unet.w*": 7}},
        {"tucker": True},
    ],
    "lokr": [
        {"ranks": {"BASE": 2, "*.strided": 1}, "alphas": {"unet": 5}},
        {"factor": 3, "decompose_both": True},
        {"full_matrix": True},
        {"factor": 2, "tucker": True},
    ],
    "oft": [{"constraint": 0.05, "rescaled": True}],
    "boft": [{"constraint": 0.05, "rescaled": True}],
    "ia3": [{"on_input": ["*"]}],
    "tlora": [{"init": "zero"}, {"init": "middle", "init_matrix": "weight", "min_rank": 1, "exponent": 2}],
}
"""Method → options under which it writes its deltas in another way than by default."""


ONE_SIDED = ("oft", "boft", "ia3")
"""Methods whose leaves tell the number of outputs or of inputs alone"""


def changes_weights(method: Method) -> bool:
    """Whether it changes weights of layers, and neither adds a token nor a network."""
    return not method.learns_token and method.read_network is None


VARIANTS = [
    (name, options)
    for name, method in methods().items()
    if changes_weights(method)
    for options in ({}, *_MORE.get(name, ()))
]
"""Method, options: every method that changes weights, found in the registry, in each of its ways of writing a delta."""


def starts_from_weight(options: dict[str, Any]) -> bool:
    """Whether the initial values are a part of the layer's weight."""
    return options.get("init") in ("pissa", "olora") or options.get("init_matrix") == "weight"


def name_of(variant: tuple[str, dict[str, Any]]) -> str:
    return "-".join([variant[0], *variant[1]])


def input_of(net: nn.Module) -> Tensor:
    first = next(net.parameters())
    return torch.randn(4, 6, 9, 8, generator=torch.Generator().manual_seed(3)).to(first.dtype)


def attach(
    net: nn.Module,
    method: str,
    options: dict[str, Any],
    paths: list[str] | None = None,
    *,
    seed: int = 7,
    alpha: float = 4.5,
) -> Attached:
    """Of rank 3."""
    chosen = get_method(method)
    spec = Spec({"unet": paths or PATHS}, 3, alpha, seed, chosen.read_options(options))
    return chosen.attach(SimpleNamespace(unet=net), spec)


@torch.no_grad()
def shake(live: Attached, seed: int = 5, size: float = 0.3) -> None:
    """Move every parameter off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for value in live.trainable().values():
        value.add_(torch.randn(value.shape, generator=generator) * size)


def deltas_of(live: Attached) -> dict[str, Delta]:
    """Path → its one delta."""
    return {path: delta for path, (delta,) in live.adapter({}).deltas.items()}


def shaken(module: nn.Module, only: str) -> None:
    """Fill the parameters whose name holds `only`."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if only in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator) + (1.0 if "magnitude" in name else 0.0))
