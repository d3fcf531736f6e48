"""Approximation of the modules of any adapter by LoRAs of another rank."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.lowrank import LowRankApproximation, RankBudget, approximate, approximate_product
from diffgraft.adapters.ops.all_timesteps import at_all_timesteps
from diffgraft.adapters.ops.effect import WeightedDeltas, shapes_of, total_as_product, total_delta
from diffgraft.adapters.training_metadata import entries_after_change
from diffgraft.bases.layers import is_embedding
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track

ALL, NEARLY_ALL = RankBudget(energy=1.0), RankBudget(energy=0.999)
"""Default sizes: for LoRAs and LoHas everything is kept, for other kinds 0.999 of the squared norm"""


@dataclass(frozen=True)
class ReducedAdapter:
    """An adapter of LoRAs that approximates another adapter, and its errors."""

    adapter: Adapter
    """The approximation"""
    errors: Mapping[str, float]
    """Path of a module → ‖difference‖ / ‖original ΔW‖"""
    dropped: tuple[str, ...] = ()
    """Names of differences of biases, norms and embeddings, which were dropped, as a LoRA cannot hold them"""

    @property
    def worst(self) -> tuple[str, float]:
        """Path and error of the module with the largest error; ("–", 0) for an empty adapter."""
        return max(self.errors.items(), key=lambda item: item[1], default=("–", 0.0))


def resize(adapter: Adapter, size: RankBudget, weights: Weights | None = None, device: str = "cpu") -> ReducedAdapter:
    """Approximate every module of an adapter by a LoRA of a given size; words and networks are not changed.

    Args:
        adapter: an adapter of any method; methods that are functions of the base's weights need `weights`.
        size: a rank, or the share of each module's squared norm that is kept.
        weights: weights of the base, from `diffgraft.bases.weights.open_weights`.
        device: device on which decompositions are computed.

    Raises:
        DiffgraftError: the adapter holds no weights, or needs those of its base.
    """
    if not adapter.deltas:
        raise DiffgraftError("The adapter holds no weights of layers, so there is nothing to resize.")
    adapter = at_all_timesteps("The adapter", adapter)
    shapes = shapes_of(adapter, weights)
    steps = {path: [(delta, 1.0) for delta in deltas] for path, deltas in adapter.deltas.items()}
    return reduce_to_loras(steps, shapes, size, adapter, weights, device)


def reduce_to_loras(
    steps: Mapping[str, WeightedDeltas],
    shapes: Mapping[str, Shape],
    size: RankBudget | None,
    like: Adapter,
    weights: Weights | None = None,
    device: str = "cpu",
) -> ReducedAdapter:
    """Approximate the sum of each module's steps by one LoRA; metadata, words and networks are those of `like`.

    Differences of biases, norms and embeddings cannot be LoRAs that programs apply; they are dropped, and listed.
    """
    deltas: dict[str, tuple[Delta, ...]] = {}
    errors: dict[str, float] = {}
    dropped: list[str] = []
    for path, module_steps in track(steps.items(), "modules", min_items=20):
        if len(shapes[path]) < 2 or is_embedding(path):
            dropped.append(path)
            continue
        if any("diff_b" in delta.leaves for delta, _ in module_steps):
            dropped.append(f"{path}.bias")
        approximation = approximate_steps(path, module_steps, shapes[path], size, weights, device)
        lora = approximation.lora(shapes[path])
        errors[path] = approximation.relative_error
        if lora is not None:
            deltas[path] = (lora,)
    metadata = {key: value for key, value in like.metadata.items() if key not in ("rank", "alpha", FOREIGN)}
    if foreign := entries_after_change(like.metadata.get(FOREIGN)):
        metadata[FOREIGN] = foreign
    method = "locon" if any(len(shapes[path]) > 2 and max(shapes[path][2:]) > 1 for path in deltas) else "lora"
    ranks = {rank_of(delta) for (delta,) in deltas.values()}
    metadata |= {"method": "pivotal" if like.tokens else method}
    if len(ranks) == 1:
        metadata |= {"rank": next(iter(ranks)), "alpha": float(next(iter(ranks)))}
    return ReducedAdapter(Adapter(deltas, metadata, like.networks, like.tokens), errors, tuple(dropped))


def rank_of(delta: Delta) -> int:
    """Rank of a LoRA, with or without DoRA; 0 for other kinds, which would have another rank as a LoRA."""
    return delta.leaves["lora_down"].shape[0] if delta.is_lora else 0


def approximate_steps(
    path: str, steps: WeightedDeltas, shape: Shape, size: RankBudget | None, weights: Weights | None, device: str
) -> LowRankApproximation:
    """Approximate what all steps add to a weight by a matrix of a given size."""
    product = total_as_product(steps, shape)
    if product is not None:
        return approximate_product(product[0].to(device), product[1].to(device), size or ALL)
    default = ALL if all(delta.is_low_rank for delta, _ in steps) else NEARLY_ALL
    return approximate(total_delta(path, steps, shape, weights, device).flatten(1), size or default)
