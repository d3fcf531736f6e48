"""Comparison of two adapters by what they do to each module."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.ops.effect import check_delta_size, matrix_shape, shapes_of, total_as_product
from diffgraft.adapters.projections import same_layer
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track


@dataclass(frozen=True)
class Norms:
    """Norms of what two adapters add to the weight and the bias of one or more modules."""

    difference: float
    """‖A − B‖ for the changes A by the first and B by the second adapter"""
    first: float
    second: float

    @property
    def error(self) -> float:
        """‖A − B‖ / ‖A‖; infinite if only the second adapter changes the weight."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.first if self.first > 0 else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between A and B; NaN if one of them is zero."""
        if not self.first or not self.second:
            return math.nan
        if self.difference == 0:
            return 1.0
        product = (self.first**2 + self.second**2 - self.difference**2) / 2
        return max(-1.0, min(1.0, product / (self.first * self.second)))

    @classmethod
    def total(cls, parts: Iterable["Norms"]) -> "Norms":
        """Return the norms over several modules together."""
        rows = [(part.difference, part.first, part.second) for part in parts]
        difference, first, second = (math.hypot(*column) for column in zip(*rows, strict=True))
        return cls(difference, first, second)


@dataclass(frozen=True)
class AdapterComparison:
    """Differences between two adapters."""

    errors: Mapping[str, float]
    """Module path → ‖W′ − W″‖ / ‖W′ − W‖, where W becomes W′ under the first and W″ under the second adapter; infinite
    if only the second changes it"""
    only_first: tuple[str, ...]
    """Paths of the modules that only the first adapter changes"""
    only_second: tuple[str, ...]
    """Paths of the modules that only the second adapter changes"""
    words: tuple[str, ...]
    """Words that only one adapter has, or that have different embeddings"""
    networks_differ: bool
    """Whether the networks of the two adapters are not equal"""
    others: Mapping[str, float]
    """``word <x>`` or ``network 0`` → ‖a − b‖ / ‖a‖ of their values a and b; infinite if only one adapter has it"""
    metadata: Mapping[str, tuple[object, object]]
    """Metadata key → its values in both adapters, for keys where they differ"""
    norms: Mapping[str, Norms] = field(default_factory=dict)
    """Module path → norms of both changes and of their difference; empty if they were not asked for"""

    @property
    def worst(self) -> tuple[str, float]:
        """Path and error of the module in which the adapters differ most."""
        return max(self.errors.items(), key=lambda item: item[1], default=("–", 0.0))

    @property
    def same(self) -> bool:
        """Whether both adapters change weights, words and networks in exactly the same way."""
        return self.worst[1] == 0 and not self.words and not self.networks_differ


def compare(
    first: Adapter,
    second: Adapter,
    weights: Weights | None = None,
    device: str = "cpu",
    *,
    with_norms: bool = False,
) -> AdapterComparison:
    """Compare two adapters at strength 1.

    Args:
        first: an adapter, to which differences are relative.
        second: the adapter that is compared with it.
        weights: weights of the base. Without them, a seeded random weight is used where the result depends on it.
        device: device on which the differences are computed.
        with_norms: whether to compute the norms of both changes too, also of equal modules.

    Raises:
        DiffgraftError: the shapes of layers are unknown, or the adapters are for layers of different shapes.
    """
    paths = {*first.deltas, *second.deltas}
    differing = {p for p in paths if not _same_leaves(first.deltas.get(p, ()), second.deltas.get(p, ()))}
    compared = paths if with_norms else differing
    shapes = _shapes(first, compared, weights)
    for path, shape in _shapes(second, compared, weights).items():
        if not same_layer(shapes.setdefault(path, shape), shape):
            raise DiffgraftError(
                f"The shapes of {path} differ, {list(shapes[path])} and {list(shape)}: they are for different bases."
            )
    errors: dict[str, float] = {}
    norms: dict[str, Norms] = {}
    order = [*first.deltas, *(path for path in second.deltas if path not in first.deltas)]
    for place, path in enumerate(track(order, "modules", min_items=20)):
        if path not in compared:
            errors[path] = 0.0
            continue
        a, b, shape = first.deltas.get(path, ()), second.deltas.get(path, ()), shapes[path]
        found = _product_norms(a, b, shape, device, with_second=with_norms)
        if found is None:
            check_delta_size(path, shape, [*a, *b])
            weight = weights[f"{path}.weight"].float() if weights is not None else random_weight(shape, place)
            found = _norms(a, b, weight.to(device))
        norms[path], errors[path] = found, found.error
    keys = {*first.metadata, *second.metadata}
    metadata = {key: (first.metadata.get(key), second.metadata.get(key)) for key in sorted(keys)}
    return AdapterComparison(
        errors,
        tuple(path for path in first.deltas if path not in second.deltas),
        tuple(path for path in second.deltas if path not in first.deltas),
        tuple(word for word in {**first.tokens, **second.tokens} if not _same_word(first, second, word)),
        not _same_networks(first, second),
        _other_errors(first, second),
        {key: pair for key, pair in metadata.items() if pair[0] != pair[1]},
        norms if with_norms else {},
    )


_ROUNDING = 1e-14
"""Relative difference below which two products are considered equal, up to the rounding of float64"""


def _shapes(adapter: Adapter, paths: set[str], weights: Weights | None) -> dict[str, Shape]:
    """Shapes of the weights at `paths`; [out, in · kernel] if only that is known, which suffices to compare factors."""
    part = replace(adapter, deltas={path: deltas for path, deltas in adapter.deltas.items() if path in paths})
    try:
        return shapes_of(part, weights)
    except DiffgraftError:
        flat = {path: matrix_shape(deltas) for path, deltas in part.deltas.items()}
        if weights is not None or not all(flat.values()):
            raise
        return {path: shape for path, shape in flat.items() if shape is not None}


def random_weight(shape: Shape, seed: int) -> Tensor:
    """Random weight of the magnitude that trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
    weight: Tensor = torch.randn(shape, generator=generator) / fan_in**0.5
    return weight


def _product_norms(
    first: tuple[Delta, ...], second: tuple[Delta, ...], shape: Shape, device: str, *, with_second: bool
) -> Norms | None:
    """Norms of two changes if all deltas are products of thin factors; None if they are not.

    It is computed in float64 without forming ΔW, as a file of a few kilobytes can hold a LoRA with gigabytes of ΔW.
    """
    steps, others = ([(delta, 1.0) for delta in deltas] for deltas in (first, second))
    norms = []
    for signed in ([*steps, *((delta, -1.0) for delta in second)], steps, *([others] if with_second else [])):
        product = total_as_product(signed, shape) if signed else (torch.zeros(1, 1), torch.zeros(1, 1))
        if product is None:
            return None
        norms.append(_norm(*(factor.to(device).double() for factor in product)))
    difference, of_first, of_second = norms if with_second else (*norms, math.nan)
    return Norms(0.0 if difference <= _ROUNDING * of_first else difference, of_first, of_second)


def _norm(up: Tensor, down: Tensor) -> float:
    """‖up · down‖ for up [out, r] and down [r, n]."""
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())


def _norms(first: tuple[Delta, ...], second: tuple[Delta, ...], weight: Tensor) -> Norms:
    """Norms of two changes, by applying both to `weight` and a zero bias."""
    bias = torch.zeros(weight.shape[0], device=weight.device)
    (w1, b1), (w2, b2) = (_apply(deltas, weight, bias) for deltas in (first, second))
    parts = ((w1 - w2, b1 - b2), (w1 - weight, b1), (w2 - weight, b2))
    difference, of_first, of_second = (
        float(torch.cat([of_weight.flatten(), of_bias.flatten()]).double().norm()) for of_weight, of_bias in parts
    )
    return Norms(difference, of_first, of_second)


def _apply(deltas: tuple[Delta, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    for delta in deltas:
        weight, changed = delta.apply(weight, bias, 1.0)
        bias = bias if changed is None else changed
    return weight, bias


def _same_leaves(first: tuple[Delta, ...], second: tuple[Delta, ...]) -> bool:
    """Whether the deltas are bitwise equal, so that nothing needs to be computed."""
    return len(first) == len(second) and all(
        (a.kind, a.alpha, set(a.leaves)) == (b.kind, b.alpha, set(b.leaves))
        and all(_equal(leaf, b.leaves[name]) for name, leaf in a.leaves.items())
        for a, b in zip(first, second, strict=True)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal values; shapes may differ, as files may store a row as a column."""
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def _other_errors(first: Adapter, second: Adapter) -> dict[str, float]:
    """Return the relative errors, against the first adapter, of token embeddings and hooked-in networks."""
    errors: dict[str, float] = {}
    for word in {**first.tokens, **second.tokens}:
        errors[f"word {word}"] = _tensors_error(first.tokens.get(word, {}), second.tokens.get(word, {}))
    for place, (a, b) in enumerate(zip_longest(first.networks, second.networks)):
        errors[f"network {place}"] = _tensors_error(a.tensors if a else {}, b.tensors if b else {})
    return errors


def _tensors_error(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        return float("inf")
    difference = sum(float((value.double() - second[name].double()).square().sum()) for name, value in first.items())
    total = sum(float(value.double().square().sum()) for value in first.values())
    return 0.0 if difference == 0 else float((difference / total) ** 0.5) if total > 0 else float("inf")


def _same_word(first: Adapter, second: Adapter, word: str) -> bool:
    a, b = first.tokens.get(word, {}), second.tokens.get(word, {})
    return set(a) == set(b) and all(torch.equal(rows, b[part]) for part, rows in a.items())


def _same_networks(first: Adapter, second: Adapter) -> bool:
    return len(first.networks) == len(second.networks) and all(
        set(a.tensors) == set(b.tensors)
        and dict(a.settings) == dict(b.settings)
        and all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items())
        for a, b in zip(first.networks, second.networks, strict=True)
    )
