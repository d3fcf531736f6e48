"""Singular values of what an adapter adds to a module, and their effective number."""

import torch
from torch import Tensor

from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.methods.lokr import Kronecker
from diffgraft.adapters.ops.effect import WeightedDeltas, total_as_product, total_delta
from diffgraft.bases.weights import Weights


def squared_singular_values(
    path: str, steps: WeightedDeltas, shape: Shape, weights: Weights | None = None, device: str = "cpu"
) -> Tensor:
    """Return the squared singular values of ΔW as a matrix [out, …], in float64 and no order; of a vector, ‖ΔW‖².

    Args:
        path: path of the module.
        steps: its deltas in order, each with its strength.
        shape: shape of its weight.
        weights: weights of the base, for deltas that are functions of the weight, such as DoRA.
        device: device to compute on.

    Raises:
        DiffgraftError: a delta is a function of the weight and `weights` is None.
    """
    if len(shape) < 2:
        squared_norm: Tensor = total_delta(path, steps, shape, weights, device).double().square().sum()[None]
        return squared_norm
    product = total_as_product(steps, shape)
    if product is not None:
        up, down = (factor.to(device).double() for factor in product)
        core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T
        values: Tensor = torch.linalg.svdvals(core).square() if core.isfinite().all() else _infinite(core)
        return values
    delta, strength = steps[0]
    if len(steps) == 1 and isinstance(delta, FactorDelta) and isinstance(delta.factors, Kronecker):
        # the singular values of w1 ⊗ w2 are all products of a singular value of w1 and one of w2
        leaves = {name: leaf.to(device).double() for name, leaf in delta.leaves.items()}
        w1, w2 = delta.factors.kronecker_factors(leaves, shape)
        if not (w1.isfinite().all() and w2.isfinite().all()):
            return _infinite(w1)
        products = torch.outer(torch.linalg.svdvals(w1).square(), torch.linalg.svdvals(w2.flatten(1)).square())
        return products.flatten() * (strength * delta.scale) ** 2
    matrix = total_delta(path, steps, shape, weights, device).flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if not gram.isfinite().all():
        return _infinite(gram)
    squares: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0)
    return squares


def effective_rank(squares: Tensor) -> float:
    """exp(−Σ p log p) with p = squares / Σ squares; 0 if all squares are 0."""
    total = squares.sum()
    if total <= 0:
        return 0.0
    if not total.isfinite():
        return float("nan")
    shares = squares / total
    return float(torch.special.entr(shares).sum().exp())


def _infinite(matrix: Tensor) -> Tensor:
    """Singular values for a ΔW beyond the range of numbers: a single infinite value."""
    return torch.full((1,), float("inf"), dtype=matrix.dtype)
