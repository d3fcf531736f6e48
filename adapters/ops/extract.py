"""Extraction of the difference of two checkpoints, text encoders included, as an adapter: LoRA, LoCon or LoHa."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats.families import with_base_of
from diffgraft.adapters.lowrank import RankBudget, approximate
from diffgraft.adapters.methods.loha import HADAMARD
from diffgraft.adapters.ops.resize import ReducedAdapter
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.progress import track

METHODS = ("lora", "locon", "loha")
_CONV_IN, _CHANNELS = "unet.conv_in.weight", {4, 9}
"""Layer in which inpainting bases have more input channels, for the picture and the mask, and both numbers of channels
"""
_ITERATIONS = 20
"""Iterations of alternating least squares for LoHa"""


def extract(
    tuned: Weights,
    base: Weights,
    size: RankBudget,
    method: str = "locon",
    metadata: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> ReducedAdapter:
    """Extract what distinguishes `tuned` from `base`.

    Args:
        tuned: the fine-tuned checkpoint, from `diffgraft.bases.weights.open_weights`.
        base: the checkpoint that it was trained from.
        size: size of each module's factors; a share of the squared norm gives each module its own rank (LoHa needs a
            rank).
        method: ``lora`` (linear layers and 1 × 1 convolutions), ``locon`` (all layers) or ``loha`` (all layers).
        metadata: metadata of the adapter.
        device: device on which decompositions are computed.

    Raises:
        DiffgraftError: the checkpoints have different shapes or do not differ, or the method is unknown. If only one of
            them is for inpainting, its first layer is skipped instead.
    """
    if method not in METHODS:
        raise DiffgraftError(f"Unknown method {method!r} for extraction: {did_you_mean(method, METHODS)}")
    if method == "loha" and size.rank is None:
        raise DiffgraftError("Extracting a LoHa needs a rank: set --rank.")
    names = [name for name in base if name in tuned]
    mismatched = [name for name in names if tuned.shape(name) != base.shape(name)]
    inpainting = mismatched == [_CONV_IN] and {tuned.shape(_CONV_IN)[1], base.shape(_CONV_IN)[1]} == _CHANNELS
    if mismatched and not inpainting:
        name = mismatched[0]
        raise DiffgraftError(
            f"{name} is {list(tuned.shape(name))} in one checkpoint and {list(base.shape(name))} in the other: they "
            "belong to different families."
        )
    if not names:
        raise DiffgraftError("The two checkpoints have no weights in common.")
    deltas: dict[str, tuple[Delta, ...]] = {}
    errors: dict[str, float] = {}
    dropped = [*mismatched, *(name for name in tuned if name not in base)]
    names = [name for name in names if name not in mismatched]
    for name in track(names, "layers"):
        shape = base.shape(name)
        path = name.removesuffix(".weight")
        is_layer = name.endswith(".weight") and len(shape) in (2, 4) and not path.endswith("_embedding")
        before, after = base[name], tuned[name]
        if not before.is_floating_point() or _are_equal(before, after):
            continue
        if not is_layer or (method == "lora" and max(shape[2:], default=1) > 1):
            dropped.append(name)
            continue
        diff = after.to(device).float() - before.to(device).float()
        delta, errors[path] = _approximate(diff, size, method)
        if delta is not None:
            deltas[path] = (delta,)
    if not deltas:
        raise DiffgraftError("The two checkpoints do not differ in any layer that such an adapter could hold.")
    adapter = Adapter(deltas, {"method": method, **(metadata or {})})
    return ReducedAdapter(with_base_of(adapter, base), errors, tuple(dropped))


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are equal, possibly stored in two precisions."""
    return torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype))


def _approximate(diff: Tensor, size: RankBudget, method: str) -> tuple[Delta | None, float]:
    """Delta for a difference of weights, None if its rank is 0, and its relative error."""
    if method != "loha":
        approximation = approximate(diff.flatten(1), size)
        return approximation.lora(tuple(diff.shape)), approximation.relative_error
    assert size.rank is not None
    leaves = fit_loha(diff.flatten(1), size.rank)
    residual = diff.flatten(1) - HADAMARD.weight(leaves, tuple(diff.flatten(1).shape))
    on_cpu = {name: leaf.cpu().contiguous() for name, leaf in leaves.items()}
    return FactorDelta(HADAMARD, on_cpu, float(size.rank)), float(residual.norm() / diff.norm())


def fit_loha(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    """Fit a LoHa to `matrix` [out, n] by alternating least squares (FedPara, arXiv:2108.06098, section 2).

    It starts with the best LoRA times a matrix of ones, and never gets worse: the error of a LoHa of rank r is at most
    that of a LoRA of rank r, which has half as many values.
    """
    matrix = matrix.double()
    out, n = matrix.shape
    first = approximate(matrix, RankBudget(rank=rank))
    kept = first.up.shape[1]
    generator = torch.Generator(matrix.device).manual_seed(0)

    def small(*sides: int) -> Tensor:
        return 1e-2 * torch.randn(*sides, generator=generator, dtype=torch.float64, device=matrix.device)

    def ones(*sides: int, axis: int) -> Tensor:
        result = torch.zeros(*sides, dtype=torch.float64, device=matrix.device)
        result.select(axis, 0).fill_(1)
        return result

    a1, b1 = torch.zeros(out, rank).to(matrix), torch.zeros(rank, n).to(matrix)
    a1[:, :kept], b1[:kept] = first.up.double(), first.down.double()
    a2, b2 = ones(out, rank, axis=1), ones(rank, n, axis=0)
    least, best = float((matrix - a1 @ b1).norm()), (a1, b1, a2, b2)
    a2, b2 = a2 + small(out, rank), b2 + small(rank, n)
    for _ in range(_ITERATIONS):
        a1 = _solve_rows(matrix, b1, a2 @ b2)
        b1 = _solve_rows(matrix.T, a1.T, (a2 @ b2).T).T
        a2 = _solve_rows(matrix, b2, a1 @ b1)
        b2 = _solve_rows(matrix.T, a2.T, (a1 @ b1).T).T
        error = float((matrix - (a1 @ b1) * (a2 @ b2)).norm())
        if error < least:
            least, best = error, (a1, b1, a2, b2)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {name: factor.float() for name, factor in zip(names, best, strict=True)}


def _solve_rows(matrix: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """Rows a [out, r] that bring (a · factor) ∘ other nearest to `matrix`; factor is [r, n], the others are [out, n].

    Each row is a least squares problem in r unknowns, with the factor's columns weighted by the row of `other`.
    """
    right = (matrix * other) @ factor.T
    pairs = (factor[:, None] * factor[None]).flatten(0, 1)  # [r · r, n]
    gram = (other.square() @ pairs.T).view(-1, len(factor), len(factor))  # [out, r, r]
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    solved: Tensor = torch.linalg.solve(gram + ridge[:, None, None] * eye, right.unsqueeze(2)).squeeze(2)
    return solved


def provenance(tuned: str | Path, base: str | Path) -> dict[str, Any]:
    """Metadata of an extracted adapter: the names of the two checkpoints."""
    return {"extracted": {"tuned": Path(tuned).name, "base": Path(base).name}}
