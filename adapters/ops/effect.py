"""Effect of an adapter on the weight of each module: the shape of the weight, and the matrix that is added to it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import Shape
from diffgraft.bases.registry import denoisers, layer_name_suffixes
from diffgraft.bases.shapes import KNOWN, layer_shapes
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError

LARGEST = 2**29
"""Maximum number of entries of a weight; the largest known, of the fused projections of FLUX.2 dev, has 2^28.4"""
WeightedDeltas = Sequence[tuple[Delta, float]]
"""Deltas of one module in order, each with its strength"""


def matrix_shape(deltas: Sequence[Delta]) -> Shape | None:
    """Shape [out, in · kernel] of a module's weight as a matrix, if one of its deltas tells; else None."""
    return next((shape for delta in deltas if (shape := delta.matrix_shape) is not None), None)


def have_one_shape(deltas: Sequence[Delta]) -> bool:
    """Whether all deltas of a module are for a weight of the same shape, as far as their leaves tell."""
    shape = _weight_shape(deltas)
    if shape is not None:
        return all(delta.fits(shape) for delta in deltas)
    flat: list[Shape] = []
    for delta in deltas:
        matrix = delta.matrix_shape
        # input norms are per channel, but a matrix shape does not separate channels from the kernel
        if matrix is not None and not (delta.direction if isinstance(delta, DoraDelta) else delta).fits(matrix):
            return False
        flat += [] if matrix is None else [(matrix[0], math.prod(matrix[1:]))]
    return len(set(flat)) < 2


def shapes_of(adapter: Adapter, weights: Weights | None = None) -> dict[str, Shape]:
    """Module path → shape of its weight, for every module of an adapter.

    With `weights` these are the shapes of the base. Without them they come from the deltas, or from the first known
    base that all deltas fit, starting with the one in the adapter's metadata.

    Raises:
        DiffgraftError: the shapes are unknown, or the adapter does not fit the base.
    """
    if weights is not None:
        base_shapes = weights.shapes()
        for path, deltas in adapter.deltas.items():
            if path not in base_shapes or not all(delta.fits(base_shapes[path]) for delta in deltas):
                problem = f"of shape {list(base_shapes[path])}" if path in base_shapes else "not in it"
                raise DiffgraftError(
                    f"The adapter does not fit this base: {path} is {problem}. Name the base it is for (--base)."
                )
        return {path: base_shapes[path] for path in adapter.deltas}
    known = {path: _weight_shape(deltas) or _linear_shape(path, deltas) for path, deltas in adapter.deltas.items()}
    if all(shape is not None for shape in known.values()):
        return {path: shape for path, shape in known.items() if shape is not None}
    for name in _bases_in_likely_order(adapter):
        base_shapes = layer_shapes(name)
        if _fit(adapter.deltas, base_shapes):
            return {path: base_shapes[path] for path in adapter.deltas}
    missing = next(path for path, shape in known.items() if shape is None)
    raise DiffgraftError(
        f"The file does not tell the shape of {missing}, and the adapter fits none of {', '.join(KNOWN)}: "
        "name the base it is for (--base)."
    )


def _weight_shape(deltas: Sequence[Delta]) -> Shape | None:
    """Shape of a module's weight, if one of its deltas tells; else None."""
    return next((shape for delta in deltas if (shape := delta.weight_shape) is not None), None)


def _linear_shape(path: str, deltas: Sequence[Delta]) -> Shape | None:
    """Shape of the weight of a module in a denoiser without convolutions, whose weights are matrices; else None."""
    part = path.partition(".")[0]
    is_linear = part in denoisers() and not layer_name_suffixes(part, "convolution")
    return matrix_shape(deltas) if is_linear else None


def _bases_in_likely_order(adapter: Adapter) -> list[str]:
    """Names of the known bases, beginning with those that the adapter's metadata names."""
    base = adapter.metadata.get("base")
    hints = [base.get("name"), base.get("family")] if isinstance(base, Mapping) else []
    first = [name for name in hints if name in KNOWN]
    return [*first, *(name for name in KNOWN if name not in first)]


def fitting_bases(deltas: Mapping[str, Sequence[Delta]]) -> list[str]:
    """Names of the known bases that have all these modules, with weights that all deltas fit."""
    return [name for name in KNOWN if _fit(deltas, layer_shapes(name))]


fitting = fitting_bases
"""Former name, for one release"""


def _fit(deltas: Mapping[str, Sequence[Delta]], shapes: Mapping[str, Shape]) -> bool:
    return all(
        path in shapes and all(delta.fits(shapes[path]) for delta in module_deltas)
        for path, module_deltas in deltas.items()
    )


def check_delta_size(path: str, shape: Shape, deltas: Sequence[Delta]) -> None:
    """Raise DiffgraftError if ΔW would be larger than any known layer, and much larger than the deltas' own leaves.

    A file of a few kilobytes can describe a matrix of many gigabytes.
    """
    stored = sum(leaf.numel() for delta in deltas for leaf in delta.leaves.values())
    if math.prod(shape) > max(LARGEST, 2 * stored):
        raise DiffgraftError(
            f"The adapter adds a matrix of shape {list(shape)} to {path}, larger than the layers of any known base, so "
            "it is not computed. The file is damaged or for another kind of base."
        )


def total_delta(path: str, steps: WeightedDeltas, shape: Shape, weights: Weights | None, device: str = "cpu") -> Tensor:
    """Return what the deltas of one module add to its weight when applied in turn: ΔW [out, in, …] in float32.

    Args:
        path: path of the module.
        steps: its deltas in order, each with its strength.
        shape: shape of its weight.
        weights: weights of the base, for deltas that are functions of the weight, such as DoRA.
        device: device to compute on.

    Raises:
        DiffgraftError: a delta is a function of the weight and `weights` is None, or ΔW is larger than any known layer.
    """
    check_delta_size(path, shape, [delta for delta, _ in steps])
    if all(isinstance(delta, LinearDelta) for delta, _ in steps):
        total = torch.zeros(shape, device=device)
        for delta, strength in steps:
            assert isinstance(delta, LinearDelta)
            total += strength * delta.delta(shape).to(device)
        return total
    if weights is None:
        kinds = sorted({delta.kind for delta, _ in steps if not isinstance(delta, LinearDelta)})
        raise DiffgraftError(
            f"The change of {path} depends on the base's weights ({', '.join(kinds)}, or DoRA): name the base (--base)."
        )
    before = weights[f"{path}.weight"].float().to(device)
    after = before
    for delta, strength in steps:
        after, _ = delta.apply(after, None, strength)
    return after - before


def total_as_product(steps: WeightedDeltas, shape: Shape) -> tuple[Tensor, Tensor] | None:
    """Return the sum of all steps as up [out, r] · down [r, n], if that is thinner than the matrix; else None.

    LoRAs are concatenated along the rank; LoHa of rank r is LoRA of rank r² by its Khatri–Rao factors.
    """
    pairs = [delta.low_rank_factors(strength) if isinstance(delta, LinearDelta) else None for delta, strength in steps]
    thin = [pair for pair in pairs if pair is not None]
    if len(thin) < len(pairs):
        return None
    up, down = torch.cat([up for up, _ in thin], 1), torch.cat([down for _, down in thin])
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    return (up, down) if up.shape[1] < min(rows, columns) else None
