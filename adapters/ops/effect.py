"""What an adapter does to the weight of each module: its shape, and the matrix that is added to it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, LinearDelta
from diffgraft.adapters.dora import DoraDelta
from diffgraft.adapters.factors import FactorDelta, Shape
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.methods.loha import khatri_rao
from diffgraft.adapters.methods.replacement import ReplacementDelta
from diffgraft.bases.shapes import KNOWN, layer_shapes
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError

LARGEST = 2**26
"""Entries of a weight, at most: the largest known here, of XL's second table of tokens, has 2^25.9"""
Steps = Sequence[tuple[Delta, float]]
"""Deltas of one module in order, each with its strength"""


def own_shape(delta: Delta) -> Shape | None:
    """The shape of the weight a delta is for, where its leaves tell: those of LoRA, full differences and Tucker do."""
    leaves = {name: leaf.to("meta") for name, leaf in delta.leaves.items()}
    if isinstance(delta, FullDelta):
        return tuple(leaves["diff"].shape) if "diff" in leaves else None
    if isinstance(delta, ReplacementDelta):
        return tuple(leaves["weight"].shape)
    if "lora_down" in leaves:
        kernel = leaves["lora_mid" if "lora_mid" in leaves else "lora_down"].shape[2:]
        return (leaves["lora_up"].shape[0], leaves["lora_down"].shape[1], *kernel)
    if isinstance(delta, FactorDelta) and ("hada_t1" in leaves or "lokr_t2" in leaves):
        kernel = leaves["hada_t1" if "hada_t1" in leaves else "lokr_t2"].shape[2:]
        found = delta.factors.weight(leaves, (0, 0, *kernel))
        return tuple(found.shape)
    return None


def matrix_shape(deltas: Sequence[Delta]) -> Shape | None:
    """The shape [out, in · kernel] of a module's LoHa or LoKr as a matrix; of other deltas their own shape."""
    for delta in deltas:
        shapes = {name: tuple(leaf.shape) for name, leaf in delta.leaves.items()}
        if (own := own_shape(delta)) is not None:
            return own
        if "hada_w1_a" in shapes:
            return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
        if delta.kind == "lokr" and "lokr_t2" not in shapes:
            one = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
            two = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
            return (one[0] * two[0], one[1] * two[1], *two[2:])
    return None


def fit_together(deltas: Sequence[Delta]) -> bool:
    """Whether all deltas of a module are for a weight of one shape, as far as their leaves tell."""
    shape = _told(deltas)
    if shape is not None:
        return all(delta.fits(shape) for delta in deltas)
    flat: list[Shape] = []
    for delta in deltas:
        own = matrix_shape([delta])
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
    return next((shape for delta in deltas if (shape := own_shape(delta)) is not None), None)


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
    pairs = [_pair(delta, strength) for delta, strength in steps]
    thin = [pair for pair in pairs if pair is not None]
    if len(thin) < len(pairs):
        return None
    up, down = torch.cat([up for up, _ in thin], 1), torch.cat([down for _, down in thin])
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    return (up, down) if up.shape[1] < min(rows, columns) else None


def is_low_rank(delta: Delta) -> bool:
    """Whether it is a LoRA or a LoHa."""
    return isinstance(delta, FactorDelta) and delta.kind in ("lora", "loha")


def _without_core(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoHa in Tucker's variant as a plain one: w_a [out, r], and the core t [r, r, …] contracted with w_b [r, in]."""
    plain: dict[str, Tensor] = {}
    for side in (1, 2):
        core, out, inner = (leaves[f"hada_{name}"] for name in (f"t{side}", f"w{side}_a", f"w{side}_b"))
        plain[f"hada_w{side}_a"] = out.T
        plain[f"hada_w{side}_b"] = torch.einsum("rs...,si->ri...", core, inner).flatten(1)
    return plain


def _pair(delta: Delta, strength: float) -> tuple[Tensor, Tensor] | None:
    if not isinstance(delta, FactorDelta):
        return None
    leaves = {name: leaf.float() for name, leaf in delta.leaves.items()}
    if delta.kind == "lora":
        up, down = leaves["lora_up"].flatten(1), leaves["lora_down"]
        if "lora_mid" in leaves:
            down = torch.einsum("rs...,si->ri...", leaves["lora_mid"], down.flatten(1))
        down = down.flatten(1)
    elif delta.kind == "loha":
        up, down = khatri_rao(_without_core(leaves) if "hada_t1" in leaves else leaves)
    else:
        return None
    return strength * delta.scale * up, down
