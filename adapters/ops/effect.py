"""What an adapter does to the weight of each module: its shape, and the matrix that is added to it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import Shape
from diffgraft.bases.shapes import KNOWN, layer_shapes
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError

LARGEST = 2**26
"""Entries of a weight, at most: the largest known here, of XL's second table of tokens, has 2^25.9"""
Steps = Sequence[tuple[Delta, float]]
"""Deltas of one module in order, each with its strength"""


def matrix_shape(deltas: Sequence[Delta]) -> Shape | None:
    """The shape [out, in · kernel] of a module's weight as a matrix, where one of its deltas tells."""
    return next((shape for delta in deltas if (shape := delta.matrix_shape) is not None), None)


def fit_together(deltas: Sequence[Delta]) -> bool:
    """Whether all deltas of a module are for a weight of one shape, as far as their leaves tell."""
    shape = _told(deltas)
    if shape is not None:
        return all(delta.fits(shape) for delta in deltas)
    flat: list[Shape] = []
    for delta in deltas:
        own = delta.matrix_shape
        # lengths of inputs are for channels, which a matrix does not tell from the kernel
        if own is not None and not (delta.direction if isinstance(delta, DoraDelta) else delta).fits(own):
            return False
        flat += [] if own is None else [(own[0], math.prod(own[1:]))]
    return len(set(flat)) < 2


def shapes_of(adapter: Adapter, weights: Weights | None = None) -> dict[str, Shape]:
    """Path → shape of the weight, for every module of an adapter.

    They are those of `weights` where a base is given; else what the deltas tell themselves, or the base whose layers
    all deltas fit, the one that the header names first.

    Raises:
        DiffgraftError: they cannot be told, or the adapter does not fit the base given.
    """
    if weights is not None:
        there = weights.shapes()
        for path, deltas in adapter.deltas.items():
            if path not in there or not all(delta.fits(there[path]) for delta in deltas):
                here = f"of shape {list(there[path])}" if path in there else "not there"
                raise DiffgraftError(f"The adapter does not fit this base: {path} is {here}. Name the base it is for.")
        return {path: there[path] for path in adapter.deltas}
    told = {path: _told(deltas) for path, deltas in adapter.deltas.items()}
    if all(shape is not None for shape in told.values()):
        return {path: shape for path, shape in told.items() if shape is not None}
    for name in _likely(adapter):
        there = layer_shapes(name)
        if _fit(adapter.deltas, there):
            return {path: there[path] for path in adapter.deltas}
    lacking = next(path for path, shape in told.items() if shape is None)
    raise DiffgraftError(
        f"The shape of {lacking} cannot be told from the file, and the adapter fits none of {', '.join(KNOWN)}: "
        "name the base it is for (--base)."
    )


def _told(deltas: Sequence[Delta]) -> Shape | None:
    """The shape of a module's weight, where one of its deltas tells."""
    return next((shape for delta in deltas if (shape := delta.weight_shape) is not None), None)


def _likely(adapter: Adapter) -> list[str]:
    said = adapter.metadata.get("base")
    hints = [said.get("name"), said.get("family")] if isinstance(said, Mapping) else []
    first = [name for name in hints if name in KNOWN]
    return [*first, *(name for name in KNOWN if name not in first)]


def fitting(deltas: Mapping[str, Sequence[Delta]]) -> list[str]:
    """Names of the known bases whose layers all deltas fit."""
    return [name for name in KNOWN if _fit(deltas, layer_shapes(name))]


def _fit(deltas: Mapping[str, Sequence[Delta]], there: Mapping[str, Shape]) -> bool:
    return all(path in there and all(delta.fits(there[path]) for delta in own) for path, own in deltas.items())


def refuse_vast(path: str, shape: Shape, deltas: Sequence[Delta]) -> None:
    """Raises DiffgraftError where a whole ΔW is larger than any layer, and than what the deltas themselves hold.

    A file of a few kilobytes can stand for a matrix of many gigabytes.
    """
    held = sum(leaf.numel() for delta in deltas for leaf in delta.leaves.values())
    if math.prod(shape) > max(LARGEST, 2 * held):
        raise DiffgraftError(
            f"What {path} adds is a matrix of {list(shape)}, larger than the layers of any base known here; it is not "
            "formed. The file is damaged or for another kind of base."
        )


def as_matrix(path: str, steps: Steps, shape: Shape, weights: Weights | None, device: str = "cpu") -> Tensor:
    """What all steps together add to a weight, [out, …] in float32; those that are functions of it need `weights`.

    Raises:
        DiffgraftError: there are such deltas, and no weights; or ΔW is larger than any layer.
    """
    refuse_vast(path, shape, [delta for delta, _ in steps])
    if all(isinstance(delta, LinearDelta) for delta, _ in steps):
        total = torch.zeros(shape, device=device)
        for delta, strength in steps:
            assert isinstance(delta, LinearDelta)
            total += strength * delta.delta(shape).to(device)
        return total
    if weights is None:
        kinds = sorted({delta.kind for delta, _ in steps if not isinstance(delta, LinearDelta)})
        raise DiffgraftError(
            f"What {path} does depends on the base's weights ({', '.join(kinds)}, or DoRA): name the base (--base)."
        )
    before = weights[f"{path}.weight"].float().to(device)
    after = before
    for delta, strength in steps:
        after, _ = delta.apply(after, None, strength)
    return after - before


def as_product(steps: Steps, shape: Shape) -> tuple[Tensor, Tensor] | None:
    """The same as up [out, r] · down [r, n], where that is thinner than the matrix; None where it is not.

    LoRAs stand side by side; LoHa of rank r is LoRA of rank r² by its Khatri–Rao factors.
    """
    pairs = [delta.thin_product(strength) if isinstance(delta, LinearDelta) else None for delta, strength in steps]
    thin = [pair for pair in pairs if pair is not None]
    if len(thin) < len(pairs):
        return None
    up, down = torch.cat([up for up, _ in thin], 1), torch.cat([down for _, down in thin])
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    return (up, down) if up.shape[1] < min(rows, columns) else None
