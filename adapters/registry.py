"""Methods and dialects by name, and the kinds of delta and network that adapter files can hold.

They are found in the modules of `diffgraft.adapters.methods` and `diffgraft.adapters.formats`, and through the entry
points of outside packages.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Delta, Network
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.groups import DIALECTS, METHODS
from diffgraft.adapters.method import Method, ReadDelta, ReadNetwork
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.plugins import discover, modules_of


@cache
def methods() -> dict[str, Method]:
    """Every method by name: the `METHOD` of each module in `methods/`, and those of outside packages.

    Raises:
        DiffgraftError: an entry point is not a `Method`, or two methods have one name.
    """
    return discover(Method, *METHODS)


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        DiffgraftError: there is no such method; the message names the nearest one.
    """
    if name not in methods():
        raise DiffgraftError(f"There is no method {name!r}: {did_you_mean(name, methods())}")
    return methods()[name]


@cache
def kinds() -> dict[str, ReadDelta]:
    """Every kind of delta → the function that builds it from its leaves.

    These are the methods that read deltas, and the `KINDS` of modules in `methods/`: kinds that other tools train, and
    that are merged and converted here.
    """
    found = {name: method.read for name, method in methods().items() if method.read is not None}
    for module in modules_of(METHODS.package):
        found |= getattr(module, "KINDS", {})
    return found


@cache
def network_kinds() -> dict[str, ReadNetwork]:
    """Every kind of network → the function that builds it: of methods, and the `NETWORKS` of modules in `methods/`."""
    found = {name: method.read_network for name, method in methods().items() if method.read_network is not None}
    for module in modules_of(METHODS.package):
        found |= getattr(module, "NETWORKS", {})
    return found


def read_delta(kind: str, leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """The delta of a kind, built from its leaves (by their canonical names) and alpha.

    Raises:
        ValueError: there is no such kind, or the leaves do not fit together.
    """
    if kind not in kinds():
        raise ValueError(f"there is no kind {kind!r} of delta: {did_you_mean(kind, kinds())}")
    return kinds()[kind](leaves, alpha)


def read_network(kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """The network of a kind, built from its tensors and settings.

    Raises:
        ValueError: there is no such kind, or tensors and settings do not fit together.
    """
    if kind not in network_kinds():
        raise ValueError(f"there is no kind {kind!r} of network: {did_you_mean(kind, network_kinds())}")
    return network_kinds()[kind](tensors, settings)


@cache
def dialects() -> dict[str, Dialect]:
    """Every dialect by name, in the order in which they are asked whether they recognise a file.

    These are the `DIALECT` of each module in `formats/`, and those of outside packages.

    Raises:
        DiffgraftError: an entry point is not a `Dialect`, or two dialects have one name.
    """
    found = discover(Dialect, *DIALECTS)
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def written_dialects() -> dict[str, Dialect]:
    """The dialects that adapters can be saved in, by name."""
    return {name: dialect for name, dialect in dialects().items() if dialect.write is not None}


def get_written_dialect(name: str) -> Dialect:
    """The dialect called `name`, which adapters can be saved in.

    Raises:
        DiffgraftError: there is no such dialect; the message names the nearest one.
    """
    if name not in written_dialects():
        raise DiffgraftError(f"There is no adapter format {name!r} to write: {did_you_mean(name, written_dialects())}")
    return written_dialects()[name]
