"""Combination of several adapters into one: an exact sum where that is possible, or a merge by TIES or DARE.

TIES (Yadav et al. 2023, arXiv:2306.01708, section 4) keeps the largest entries of each matrix, lets the sum decide the
sign of each entry, and takes the mean of the entries that agree with it. DARE (Yu et al. 2023, arXiv:2311.03099,
equation 1) drops entries at random and scales up the others. Both are applied to each module separately.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta, Network
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.formats.families import common_base_metadata
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.lowrank import RankBudget
from diffgraft.adapters.methods.full import FullDelta
from diffgraft.adapters.ops.all_timesteps import at_all_timesteps
from diffgraft.adapters.ops.effect import WeightedDeltas, shapes_of, total_delta
from diffgraft.adapters.ops.resize import ReducedAdapter, reduce_to_loras
from diffgraft.adapters.projections import same_layer
from diffgraft.adapters.strengths import Strength, Strengths, strengths_of
from diffgraft.adapters.training_metadata import common_entries, entries_after_change
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.progress import track

ALGORITHMS = ("sum", "ties", "dare", "concepts")
"""Names of algorithms; `combine` has all but the last, which needs text encoders and is in `ops.concepts`"""


def combine(
    adapters: Sequence[tuple[str, Adapter, Strength]],
    size: RankBudget | None = None,
    algorithm: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    weights: Weights | None = None,
    device: str = "cpu",
) -> ReducedAdapter:
    """Build one adapter of LoRAs that does what `adapters` do together.

    Args:
        adapters: name for messages, adapter, and its strength, or strengths by part or block; negative strengths
            subtract.
        size: size of each module's LoRA. Without it, LoRAs and LoHas are summed exactly, and for other kinds 0.999 of
            the squared norm is kept.
        algorithm: ``sum``, ``ties`` or ``dare``.
        density: share of the entries that TIES and DARE keep.
        seed: seed of the entries that DARE drops.
        weights: weights of the base, which methods that are functions of them need.
        device: device on which decompositions are computed.

    Raises:
        DiffgraftError: two adapters have the same word, a network has a strength other than 1, or the algorithm is
            unknown.
    """
    if algorithm not in ALGORITHMS:
        raise DiffgraftError(
            f"Unknown algorithm {algorithm!r} to combine adapters: {did_you_mean(algorithm, ALGORITHMS)}"
        )
    if algorithm == "concepts":
        raise DiffgraftError("Concepts are merged by `merge_concepts`, with the base's text encoders and captions.")
    if not 0 < density <= 1:
        raise DiffgraftError(f"Invalid value density={density}: must be above 0 and at most 1.")
    inputs = [
        (name, at_all_timesteps(name, adapter), strengths_of(name, strength)) for name, adapter, strength in adapters
    ]
    shapes: dict[str, Shape] = {}
    for name, adapter, _ in inputs:
        for path, shape in shapes_of(adapter, weights).items():
            if not same_layer(shapes.setdefault(path, shape), shape):
                raise DiffgraftError(
                    f"{path} has shape {list(shape)} in {name}, but {list(shapes[path])} in an earlier adapter: the "
                    "adapters are for different bases."
                )
    combined = combined_metadata(inputs)
    steps_by_adapter: dict[str, list[WeightedDeltas]] = {}
    for _, adapter, strengths in inputs:
        for path, deltas in adapter.deltas.items():
            if strength := strengths.at(path):
                steps_by_adapter.setdefault(path, []).append([(delta, strength) for delta in deltas])
    steps: dict[str, WeightedDeltas] = {
        path: [*chain.from_iterable(several)] for path, several in steps_by_adapter.items()
    }
    if algorithm != "sum":
        generator = torch.Generator().manual_seed(seed)
        paths = sorted(path for path in steps_by_adapter if len(shapes[path]) > 1)
        for path in track(paths, algorithm, min_items=20):
            changes = [total_delta(path, several, shapes[path], weights) for several in steps_by_adapter[path]]
            merged = ties(changes, density) if algorithm == "ties" else dare(changes, density, generator)
            biases = [delta.leaves["diff_b"] for delta, _ in steps[path] if "diff_b" in delta.leaves]
            bias = {"diff_b": biases[0]} if biases else {}  # its value is unused, it is only reported as dropped
            steps[path] = [(FullDelta({"diff": merged, **bias}), 1.0)]
    return reduce_to_loras(steps, shapes, size, combined, weights, device)


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """Merge changes of a weight, already multiplied with their strengths, by TIES: trim, elect signs, average."""
    trimmed = torch.stack([_trim(change, density) for change in changes])
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def _trim(change: Tensor, density: float) -> Tensor:
    """Set all but the largest entries of `change` to zero."""
    count = max(1, round(density * change.numel()))
    least = change.abs().flatten().kthvalue(change.numel() - count + 1).values
    return torch.where(change.abs() >= least, change, torch.zeros_like(change))


def dare(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Merge changes of a weight, already multiplied with their strengths, by DARE: drop, scale up the rest, sum."""
    masks = [torch.rand(change.shape, generator=generator) < density for change in changes]
    return torch.stack([change * mask / density for change, mask in zip(changes, masks, strict=True)]).sum(0)


def combined_metadata(inputs: Sequence[tuple[str, Adapter, Strengths]]) -> Adapter:
    """Return an adapter without deltas that has the words, networks and metadata of all adapters.

    Raises:
        DiffgraftError: two adapters have the same word, or a network has a strength other than 1.
    """
    tokens: dict[str, dict[str, Tensor]] = {}
    networks: list[Network] = []
    for name, adapter, strengths in inputs:
        for word, vectors in adapter.tokens.items():
            if word in tokens:
                raise DiffgraftError(f"{name} has the word {word!r}, which an earlier adapter has too.")
            tokens[word] = dict(vectors)
        if adapter.networks and strengths.denoiser != 1:
            raise DiffgraftError(
                f"{name} holds a {adapter.networks[0].kind}, which can only be combined at strength 1."
            )
        networks += adapter.networks
    bases = [adapter.metadata.get("base") for _, adapter, _ in inputs]
    metadata: dict[str, Any] = {"combined": [{"method": adapter.method, "name": name} for name, adapter, _ in inputs]}
    triggers = [str(adapter.metadata["trigger"]) for _, adapter, _ in inputs if adapter.metadata.get("trigger")]
    metadata |= {"trigger": ", ".join(dict.fromkeys(triggers))} if triggers else {}
    metadata |= {"base": bases[0]} if bases[0] and all(base == bases[0] for base in bases) else {}
    if "base" not in metadata and (base := common_base_metadata([adapter for _, adapter, _ in inputs])):
        metadata["base"] = base
    if foreign := common_entries([entries_after_change(adapter.metadata.get(FOREIGN)) for _, adapter, _ in inputs]):
        metadata[FOREIGN] = foreign
    no_deltas: dict[str, tuple[Delta, ...]] = {}
    return Adapter(no_deltas, metadata, tuple(networks), tokens)
