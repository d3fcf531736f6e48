"""What a method is: one file beside this one, holding one `METHOD`."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from torch import nn

from diffgraft.adapters.adapter import Delta
from diffgraft.errors import DiffgraftError, nearest


class Attached(Protocol):
    """A method grafted onto a live module: its forward runs with the deltas, and they are trainable."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters by name, always in the same order."""

    def deltas(self) -> dict[str, Delta]:
        """A copy, in float32 on the CPU, of what is attached: path inside the module → delta."""

    def detach(self) -> None:
        """Take it off again: the module is as it was before, with the same weights in the same places."""


@dataclass(frozen=True)
class Method:
    """One way to parametrise what an adapter does."""

    name: str
    summary: str
    """One line for ``diffgraft methods``."""
    attach: Callable[..., Attached]
    """``attach(module, paths, rank=…, alpha=…, seed=…)`` grafts it onto the submodules of `module` at `paths`."""


@cache
def methods() -> dict[str, Method]:
    """Every method there is, by name: each module of this package that holds a `METHOD`."""
    package = importlib.import_module("diffgraft.adapters")
    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"diffgraft.adapters.{module_info.name}")
        method = getattr(module, "METHOD", None)
        if isinstance(method, Method):
            found[method.name] = method
    return found


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        DiffgraftError: there is none; the nearest name is in the message.
    """
    if name not in methods():
        raise DiffgraftError(f"There is no method {name!r}: {nearest(name, methods())}")
    return methods()[name]


def find_modules(root: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Paths of the linear and convolution layers inside `root` whose path ends in one of `endings`."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        path
        for path, module in root.named_modules()
        if isinstance(module, kinds) and any(path == end or path.endswith("." + end) for end in endings)
    ]
