"""Several adapters as one: summed exactly where that can be, or by TIES or DARE.

TIES (Yadav et al. 2023, arXiv:2306.01708, section 4) keeps of each matrix its largest entries, lets the sum decide the
sign of each entry, and takes the mean of those that agree. DARE (Yu et al. 2023, arXiv:2311.03099, equation 1) drops
entries at random and scales up the rest. Both are done for each module by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, Network
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.formats.families import common_base
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.ops.effect import Steps, as_matrix, shapes_of
from diffgraft.adapters.ops.resize import Reduced, reduced
from diffgraft.adapters.projections import same_layer
from diffgraft.adapters.strengths import Strength, Strengths, strengths_of
from diffgraft.adapters.training_metadata import of_all, still_true
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.progress import track

ALGORITHMS = ("sum", "ties", "dare")


def combine(
    adapters: Sequence[tuple[str, Adapter, Strength]],
    size: RankBudget | None = None,
    algorithm: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    weights: Weights | None = None,
    device: str = "cpu",
) -> Reduced:
    """One adapter of LoRAs that does what `adapters` do together.

    Args:
        adapters: a name for errors, the adapter, and its strength, or strengths by part or block; negative ones
            subtract.
        size: of each module's LoRA. Where none is asked for, LoRAs and LoHas are summed exactly; of others 0.999 of
            the squared norm is kept.
        algorithm: ``sum``, ``ties`` or ``dare``.
        density: the share of entries that TIES and DARE keep.
        seed: of what DARE drops.
        weights: the base, for methods that are functions of its weights.
        device: where the decompositions run.

    Raises:
        DiffgraftError: two adapters have the same word, a network has a strength other than 1, or the algorithm is
            unknown.
    """
    if algorithm not in ALGORITHMS:
        raise DiffgraftError(f"Unknown algorithm {algorithm!r} for combining: {did_you_mean(algorithm, ALGORITHMS)}")
    if not 0 < density <= 1:
        raise DiffgraftError(f"Invalid value density={density}: must be the share that is kept, above 0 and at most 1.")
    read = [(name, adapter, strengths_of(name, strength)) for name, adapter, strength in adapters]
    shapes: dict[str, Shape] = {}
    for name, adapter, _ in read:
        for path, shape in shapes_of(adapter, weights).items():
            if not same_layer(shapes.setdefault(path, shape), shape):
                raise DiffgraftError(
                    f"{name} has {path} of shape {list(shape)}, an earlier adapter of {list(shapes[path])}: they are "
                    "for different bases."
                )
    together = _together(read)
    each: dict[str, list[Steps]] = {}
    for _, adapter, strengths in read:
        for path, deltas in adapter.deltas.items():
            if strength := strengths.at(path):
                each.setdefault(path, []).append([(delta, strength) for delta in deltas])
    steps: dict[str, Steps] = {path: [step for own in several for step in own] for path, several in each.items()}
    if algorithm != "sum":
        generator = torch.Generator().manual_seed(seed)
        paths = sorted(path for path in each if len(shapes[path]) > 1)
        for path in track(paths, algorithm, min_items=20):
            changes = [as_matrix(path, own, shapes[path], weights) for own in each[path]]
            merged = ties(changes, density) if algorithm == "ties" else dare(changes, density, generator)
            biases = [delta.leaves["diff_b"] for delta, _ in steps[path] if "diff_b" in delta.leaves]
            of_bias = {"diff_b": biases[0]} if biases else {}  # of which it is only told that they are left away
            steps[path] = [(FullDelta({"diff": merged, **of_bias}), 1.0)]
    return reduced(steps, shapes, size, together, weights, device)


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """Changes of one weight, multiplied with their strengths: trimmed, signs elected, the mean of those taken."""
    trimmed = torch.stack([_trimmed(change, density) for change in changes])
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """`change` with all but its largest entries zero."""
    kept = max(1, round(density * change.numel()))
    least = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= least, change, torch.zeros_like(change))


def dare(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Changes of one weight, entries dropped at random and the rest scaled up, summed."""
    kept = [torch.rand(change.shape, generator=generator) < density for change in changes]
    return torch.stack([change * keep / density for change, keep in zip(changes, kept, strict=True)]).sum(0)


def _together(read: Sequence[tuple[str, Adapter, Strengths]]) -> Adapter:
    """Words, networks and metadata of all."""
    tokens: dict[str, dict[str, Tensor]] = {}
    networks: list[Network] = []
    for name, adapter, strengths in read:
        for word, vectors in adapter.tokens.items():
            if word in tokens:
                raise DiffgraftError(f"{name} teaches the word {word!r}, and an earlier adapter does, too.")
            tokens[word] = dict(vectors)
        if adapter.networks and strengths.of_denoiser != 1:
            raise DiffgraftError(
                f"{name} holds a {adapter.networks[0].kind}, which can only be combined at strength 1."
            )
        networks += adapter.networks
    bases = [adapter.metadata.get("base") for _, adapter, _ in read]
    said: dict[str, Any] = {"combined": [{"method": adapter.method, "name": name} for name, adapter, _ in read]}
    triggers = [str(adapter.metadata["trigger"]) for _, adapter, _ in read if adapter.metadata.get("trigger")]
    said |= {"trigger": ", ".join(dict.fromkeys(triggers))} if triggers else {}
    said |= {"base": bases[0]} if bases[0] and all(base == bases[0] for base in bases) else {}
    if "base" not in said and (common := common_base([adapter for _, adapter, _ in read])):
        said["base"] = common
    foreign = [still_true(adapter.metadata.get(FOREIGN)) for _, adapter, _ in read]
    if kept := of_all(foreign):
        said[FOREIGN] = kept
    unused: dict[str, tuple[Delta, ...]] = {}
    return Adapter(unused, said, tuple(networks), tokens)
