"""Where two adapters differ in what they do, module by module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.ops.effect import as_product, matrix_shape, refuse_vast, shapes_of
from diffgraft.adapters.projections import same_layer
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track


@dataclass(frozen=True)
class Comparison:
    """How far two adapters are apart."""

    errors: Mapping[str, float]
    """Path → ‖W′ − W″‖ / ‖W′ − W‖, of a weight W under the first and the second; infinite where only the latter acts"""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    words: tuple[str, ...]
    """Words that only one of them teaches, or to which they give other vectors"""
    networks_differ: bool
    others: Mapping[str, float]
    """The same of words and networks, as ``word <x>`` and ``network 0``: ‖a − b‖ / ‖a‖ of their numbers; infinite where
    only one of the two has them"""
    metadata: Mapping[str, tuple[object, object]]
    """Key → what either says, where they do not say the same"""

    @property
    def worst(self) -> tuple[str, float]:
        """The module in which they are furthest apart."""
        return max(self.errors.items(), key=lambda item: item[1], default=("–", 0.0))

    @property
    def same(self) -> bool:
        """Whether they do the very same."""
        return self.worst[1] == 0 and not self.words and not self.networks_differ


def compare(first: Adapter, second: Adapter, weights: Weights | None = None, device: str = "cpu") -> Comparison:
    """Both at strength 1, on the base's weights where they are given, else, where one matters, on a seeded random one.

    It is computed on `device`.

    Raises:
        DiffgraftError: the shapes of the layers cannot be told, or are not the same.
    """
    paths = {*first.deltas, *second.deltas}
    differing = {p for p in paths if not _same_leaves(first.deltas.get(p, ()), second.deltas.get(p, ()))}
    shapes = _shapes(first, differing, weights)
    for path, shape in _shapes(second, differing, weights).items():
        if not same_layer(shapes.setdefault(path, shape), shape):
            raise DiffgraftError(
                f"The one has {path} of shape {list(shapes[path])}, the other of {list(shape)}: they are for different "
                "bases."
            )
    errors: dict[str, float] = {}
    order = [*first.deltas, *(path for path in second.deltas if path not in first.deltas)]
    for place, path in enumerate(track(order, "modules", min_items=20)):
        if path not in differing:
            errors[path] = 0.0
            continue
        one, two, shape = first.deltas.get(path, ()), second.deltas.get(path, ()), shapes[path]
        if (apart := _products_apart(one, two, shape, device)) is not None:
            errors[path] = apart
            continue
        refuse_vast(path, shape, [*one, *two])
        weight = weights[f"{path}.weight"].float() if weights is not None else probe(shape, place)
        errors[path] = _apart(one, two, weight.to(device))
    keys = {*first.metadata, *second.metadata}
    said = {key: (first.metadata.get(key), second.metadata.get(key)) for key in sorted(keys)}
    return Comparison(
        errors,
        tuple(path for path in first.deltas if path not in second.deltas),
        tuple(path for path in second.deltas if path not in first.deltas),
        tuple(word for word in {**first.tokens, **second.tokens} if not _same_word(first, second, word)),
        not _same_networks(first, second),
        _others(first, second),
        {key: pair for key, pair in said.items() if pair[0] != pair[1]},
    )


_ROUNDED = 1e-14
"""Relative difference below which nothing but the rounding of float64 is left"""


def _shapes(adapter: Adapter, paths: set[str], weights: Weights | None) -> dict[str, Shape]:
    """Shapes of the weights at `paths`; where no base tells, [out, in · kernel], in which factors compare as well."""
    part = replace(adapter, deltas={path: own for path, own in adapter.deltas.items() if path in paths})
    try:
        return shapes_of(part, weights)
    except DiffgraftError:
        flat = {path: matrix_shape(own) for path, own in part.deltas.items()}
        if weights is not None or not all(flat.values()):
            raise
        return {path: shape for path, shape in flat.items() if shape is not None}


def probe(shape: Shape, seed: int) -> Tensor:
    """A random weight as large as those of trained layers are."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
    found: Tensor = torch.randn(shape, generator=generator) / fan_in**0.5
    return found


def _products_apart(one: tuple[Delta, ...], two: tuple[Delta, ...], shape: Shape, device: str) -> float | None:
    """The same for products of thin factors, in float64 and without forming them; None where they are something else.

    A file of a few kilobytes can hold a LoRA whose ΔW takes gigabytes.
    """
    steps = [(delta, 1.0) for delta in one]
    norms = []
    for own in ([*steps, *((delta, -1.0) for delta in two)], steps):
        product = as_product(own, shape) if own else (torch.zeros(1, 1), torch.zeros(1, 1))
        if product is None:
            return None
        norms.append(_norm(*(factor.to(device).double() for factor in product)))
    apart, whole = norms
    if apart <= _ROUNDED * whole:
        return 0.0
    return apart / whole if whole > 0 else float("inf")


def _norm(up: Tensor, down: Tensor) -> float:
    """‖up · down‖ of up [out, r] and down [r, n]."""
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())


def _apart(one: tuple[Delta, ...], two: tuple[Delta, ...], weight: Tensor) -> float:
    bias = torch.zeros(weight.shape[0], device=weight.device)
    (w1, b1), (w2, b2) = (_under(deltas, weight, bias) for deltas in (one, two))
    apart = torch.cat([(w1 - w2).flatten(), (b1 - b2).flatten()]).double().norm()
    whole = torch.cat([(w1 - weight).flatten(), b1.flatten()]).double().norm()
    if apart == 0:
        return 0.0
    return float(apart / whole) if whole > 0 else float("inf")


def _under(deltas: tuple[Delta, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    for delta in deltas:
        weight, changed = delta.apply(weight, bias, 1.0)
        bias = bias if changed is None else changed
    return weight, bias


def _same_leaves(one: tuple[Delta, ...], two: tuple[Delta, ...]) -> bool:
    """Whether they are the same to the bit, so that nothing need be computed."""
    return len(one) == len(two) and all(
        (a.kind, a.alpha, set(a.leaves)) == (b.kind, b.alpha, set(b.leaves))
        and all(_equal(leaf, b.leaves[name]) for name, leaf in a.leaves.items())
        for a, b in zip(one, two, strict=True)
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    """Files may write a row of numbers as a column."""
    return one.numel() == two.numel() and torch.equal(one.flatten(), two.flatten())


def _others(first: Adapter, second: Adapter) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in {**first.tokens, **second.tokens}:
        found[f"word {word}"] = _numbers_apart(first.tokens.get(word, {}), second.tokens.get(word, {}))
    for place, (one, two) in enumerate(zip_longest(first.networks, second.networks)):
        found[f"network {place}"] = _numbers_apart(one.tensors if one else {}, two.tensors if two else {})
    return found


def _numbers_apart(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in two.items()}:
        return float("inf")
    apart = sum(float((value.double() - two[name].double()).square().sum()) for name, value in one.items())
    whole = sum(float(value.double().square().sum()) for value in one.values())
    return 0.0 if apart == 0 else float((apart / whole) ** 0.5) if whole > 0 else float("inf")


def _same_word(first: Adapter, second: Adapter, word: str) -> bool:
    one, two = first.tokens.get(word, {}), second.tokens.get(word, {})
    return set(one) == set(two) and all(torch.equal(rows, two[part]) for part, rows in one.items())


def _same_networks(first: Adapter, second: Adapter) -> bool:
    return len(first.networks) == len(second.networks) and all(
        set(one.tensors) == set(two.tensors)
        and dict(one.settings) == dict(two.settings)
        and all(torch.equal(value, two.tensors[name]) for name, value in one.tensors.items())
        for one, two in zip(first.networks, second.networks, strict=True)
    )
