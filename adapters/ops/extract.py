"""The difference of two checkpoints as an adapter: LoRA, LoCon or LoHa, layer by layer, text encoders included."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.formats.families import made_for
from diffgraft.adapters.lowrank import RankBudget, nearest
from diffgraft.adapters.methods.loha import HADAMARD
from diffgraft.adapters.ops.resize import Reduced
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.progress import track

METHODS = ("lora", "locon", "loha")
_FIRST, _CHANNELS = "unet.conv_in.weight", {4, 9}
"""The layer in which a base for inpainting has more input channels: those of the picture and of the mask"""
_SWEEPS = 20
"""Rounds of alternating least squares for LoHa"""


def extract(
    tuned: Weights,
    base: Weights,
    size: RankBudget,
    method: str = "locon",
    metadata: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Reduced:
    """What `tuned` has that `base` has not.

    Args:
        tuned: the checkpoint that was trained further, from `diffgraft.bases.weights.open_weights`.
        base: the one it started from.
        size: of each module's factors; a share of the squared norm gives each its own rank (of LoHa: a rank only).
        method: ``lora`` (linear layers and 1 × 1 convolutions), ``locon`` (all layers) or ``loha`` (all layers).
        metadata: what the adapter's file shall say.
        device: where the decompositions run.

    Raises:
        DiffgraftError: the two differ in shape, or do not differ at all; there is no such method. (Where one of them
            is for inpainting, its first layer alone is left out.)
    """
    if method not in METHODS:
        raise DiffgraftError(f"{method!r} cannot be extracted: {did_you_mean(method, METHODS)}")
    if method == "loha" and size.rank is None:
        raise DiffgraftError("LoHa is fitted to a rank: give --rank.")
    names = [name for name in base if name in tuned]
    misshapen = [name for name in names if tuned.shape(name) != base.shape(name)]
    inpainting = misshapen == [_FIRST] and {tuned.shape(_FIRST)[1], base.shape(_FIRST)[1]} == _CHANNELS
    if misshapen and not inpainting:
        name = misshapen[0]
        raise DiffgraftError(
            f"{name} is {list(tuned.shape(name))} in one checkpoint and {list(base.shape(name))} in the other: they "
            "are of different families."
        )
    if not names:
        raise DiffgraftError("The two checkpoints have no weight in common.")
    deltas: dict[str, tuple[Delta, ...]] = {}
    lost: dict[str, float] = {}
    dropped = [*misshapen, *(name for name in tuned if name not in base)]
    names = [name for name in names if name not in misshapen]
    for name in track(names, "layers"):
        shape = base.shape(name)
        path = name.removesuffix(".weight")
        is_layer = name.endswith(".weight") and len(shape) in (2, 4) and not path.endswith("_embedding")
        before, after = base[name], tuned[name]
        if not before.is_floating_point() or _same(before, after):
            continue
        if not is_layer or (method == "lora" and max(shape[2:], default=1) > 1):
            dropped.append(name)
            continue
        diff = after.to(device).float() - before.to(device).float()
        found, lost[path] = _one(diff, size, method)
        if found is not None:
            deltas[path] = (found,)
    if not deltas:
        raise DiffgraftError("The two checkpoints do not differ in any layer that such an adapter could hold.")
    found_all = Adapter(deltas, {"method": method, **(metadata or {})})
    return Reduced(made_for(found_all, base), lost, tuple(dropped))


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether they are the same weight, perhaps stored in two precisions."""
    return torch.equal(one.to(two.dtype), two) or torch.equal(one, two.to(one.dtype))


def _one(diff: Tensor, size: RankBudget, method: str) -> tuple[Delta | None, float]:
    if method != "loha":
        found = nearest(diff.flatten(1), size)
        return found.lora(tuple(diff.shape)), found.lost
    assert size.rank is not None
    leaves = fit_loha(diff.flatten(1), size.rank)
    left = diff.flatten(1) - HADAMARD.weight(leaves, tuple(diff.flatten(1).shape))
    own = {name: leaf.cpu().contiguous() for name, leaf in leaves.items()}
    return FactorDelta(HADAMARD, own, float(size.rank)), float(left.norm() / diff.norm())


def fit_loha(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    """Factors of a LoHa near `matrix` [out, n], by alternating least squares (FedPara, arXiv:2108.06098, section 2).

    It begins with the nearest LoRA times a matrix of ones, and gets no worse from there: LoHa of rank r is never
    further away than LoRA of rank r, which has half as many numbers.
    """
    matrix = matrix.double()
    out, n = matrix.shape
    first = nearest(matrix, RankBudget(rank=rank))
    kept = first.up.shape[1]
    generator = torch.Generator(matrix.device).manual_seed(0)

    def small(*sides: int) -> Tensor:
        return 1e-2 * torch.randn(*sides, generator=generator, dtype=torch.float64, device=matrix.device)

    def ones(*sides: int, axis: int) -> Tensor:
        found = torch.zeros(*sides, dtype=torch.float64, device=matrix.device)
        found.select(axis, 0).fill_(1)
        return found

    a1, b1 = torch.zeros(out, rank).to(matrix), torch.zeros(rank, n).to(matrix)
    a1[:, :kept], b1[:kept] = first.up.double(), first.down.double()
    a2, b2 = ones(out, rank, axis=1), ones(rank, n, axis=0)
    least, best = float((matrix - a1 @ b1).norm()), (a1, b1, a2, b2)
    a2, b2 = a2 + small(out, rank), b2 + small(rank, n)
    for _ in range(_SWEEPS):
        a1 = _rows(matrix, b1, a2 @ b2)
        b1 = _rows(matrix.T, a1.T, (a2 @ b2).T).T
        a2 = _rows(matrix, b2, a1 @ b1)
        b2 = _rows(matrix.T, a2.T, (a1 @ b1).T).T
        left = float((matrix - (a1 @ b1) * (a2 @ b2)).norm())
        if left < least:
            least, best = left, (a1, b1, a2, b2)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {name: factor.float() for name, factor in zip(names, best, strict=True)}


def _rows(matrix: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """The rows a [out, r] that bring (a · factor) ∘ other nearest to `matrix`; factor [r, n], the others [out, n].

    For each row that is least squares in r unknowns, with the factor's columns weighted by the row of `other`.
    """
    right = (matrix * other) @ factor.T
    pairs = (factor[:, None] * factor[None]).flatten(0, 1)  # [r · r, n]
    gram = (other.square() @ pairs.T).view(-1, len(factor), len(factor))  # [out, r, r]
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    solved: Tensor = torch.linalg.solve(gram + ridge[:, None, None] * eye, right.unsqueeze(2)).squeeze(2)
    return solved


def stated(tuned: str | Path, base: str | Path) -> dict[str, Any]:
    """What the header says of where an adapter comes from."""
    return {"extracted": {"tuned": Path(tuned).name, "base": Path(base).name}}
