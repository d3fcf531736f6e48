"""Methods and dialects by name, and the kinds of delta and network that adapter files can hold.

Built-in ones are the modules of `diffgraft.adapters.methods` and `diffgraft.adapters.formats`; outside packages add
theirs through entry points.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Delta, Network
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.dora import with_strength_convention
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.groups import DIALECTS, METHODS
from diffgraft.adapters.method import Method, ReadDelta, ReadNetwork
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.plugins import discover, modules_of


@cache
def methods() -> dict[str, Method]:
    """All methods by name: the `METHOD` of each module in `methods/`, and those of outside packages.

    Raises:
        DiffgraftError: an entry point is not a `Method`, or two methods have the same name.
    """
    return discover(Method, *METHODS)


def get_method(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        DiffgraftError: no method has this name; the message names the nearest one.
    """
    if name not in methods():
        raise DiffgraftError(f"There is no method {name!r}: {did_you_mean(name, methods())}")
    return methods()[name]


@cache
def kinds() -> dict[str, ReadDelta]:
    """All kinds of delta → the function that builds a delta of that kind from leaves and alpha.

    These are the methods that read deltas, and the `KINDS` of modules in `methods/`: kinds that other tools train and
    that this project merges and converts.
    """
    builders = {name: method.read for name, method in methods().items() if method.read is not None}
    for module in modules_of(METHODS.package):
        builders |= getattr(module, "KINDS", {})
    return builders


@cache
def network_kinds() -> dict[str, ReadNetwork]:
    """All kinds of network → the function that builds it: of methods, and the `NETWORKS` of modules in `methods/`."""
    builders = {name: method.read_network for name, method in methods().items() if method.read_network is not None}
    for module in modules_of(METHODS.package):
        builders |= getattr(module, "NETWORKS", {})
    return builders


def read_delta(kind: str, leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """Build the delta of a kind from its leaves (by their canonical names) and alpha.

    Raises:
        ValueError: the kind is unknown, or the leaves do not fit together.
    """
    if kind not in kinds():
        raise ValueError(f"unknown kind {kind!r} of delta: {did_you_mean(kind, kinds())}")
    return kinds()[kind](leaves, alpha)


def with_leaves(delta: Delta, leaves: Mapping[str, Tensor]) -> Delta:
    """Return `delta` with other leaves; kind, alpha, strengths and ranks by timestep stay.

    Raises:
        ValueError: the leaves do not fit together.
    """
    changed = read_delta(delta.kind, leaves, delta.alpha)
    if delta.strength_convention:
        changed = with_strength_convention(changed, delta.strength_convention)
    if isinstance(changed, FactorDelta) and delta.rank_schedule is not None:
        changed = replace(changed, rank_schedule=delta.rank_schedule)
    return changed


def read_network(kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the network of a kind from its tensors and settings.

    Raises:
        ValueError: the kind is unknown, or tensors and settings do not fit together.
    """
    if kind not in network_kinds():
        raise ValueError(f"unknown kind {kind!r} of network: {did_you_mean(kind, network_kinds())}")
    return network_kinds()[kind](tensors, settings)


@cache
def dialects() -> dict[str, Dialect]:
    """All dialects by name, in the order in which they are asked whether they recognise a file.

    These are the `DIALECT` of each module in `formats/`, and those of outside packages.

    Raises:
        DiffgraftError: an entry point is not a `Dialect`, or two dialects have the same name.
    """
    by_name = discover(Dialect, *DIALECTS)
    return dict(sorted(by_name.items(), key=lambda item: (item[1].order, item[0])))


def written_dialects() -> dict[str, Dialect]:
    """Dialects that adapters can be saved in, by name."""
    return {name: dialect for name, dialect in dialects().items() if dialect.write is not None}


def get_written_dialect(name: str) -> Dialect:
    """Return the dialect (format of adapter files) called `name`, for writing.

    Raises:
        DiffgraftError: there is no such dialect, or its files are only read; the message names the nearest one.
    """
    if name not in written_dialects():
        raise DiffgraftError(f"There is no adapter format {name!r} to write: {did_you_mean(name, written_dialects())}")
    return written_dialects()[name]
