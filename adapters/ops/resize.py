"""Any adapter as LoRA of another rank, each module by itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.factors import Shape
from diffgraft.adapters.formats.header import FOREIGN
from diffgraft.adapters.lowrank import LowRankApproximation, RankBudget, nearest, nearest_to_product
from diffgraft.adapters.ops.effect import Steps, as_matrix, as_product, shapes_of
from diffgraft.adapters.training_metadata import still_true
from diffgraft.bases.layers import is_embedding
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError
from diffgraft.progress import track

ALL, NEARLY_ALL = RankBudget(energy=1.0), RankBudget(energy=0.999)
"""What is kept where no size is asked for: of LoRAs and LoHas all; of others so much"""


@dataclass(frozen=True)
class Reduced:
    """An adapter of LoRAs, and how near it comes."""

    adapter: Adapter
    lost: Mapping[str, float]
    """Path of a module → ‖difference‖ / ‖what it was‖"""
    dropped: tuple[str, ...] = ()
    """What has no LoRA and was left out: differences of biases, of norms and of embeddings"""

    @property
    def worst(self) -> tuple[str, float]:
        """The module that lost most, and how much; of an empty adapter none."""
        return max(self.lost.items(), key=lambda item: item[1], default=("–", 0.0))


def resize(adapter: Adapter, size: RankBudget, weights: Weights | None = None, device: str = "cpu") -> Reduced:
    """`adapter` with every module as a LoRA of that size; words and networks stay as they are.

    Args:
        adapter: of any methods; those that are functions of the base's weights need `weights`.
        size: a rank, or the share of each module's squared norm that is kept.
        weights: the base it is for, from `diffgraft.bases.weights.open_weights`.
        device: where the decompositions run.

    Raises:
        DiffgraftError: it needs a base, or holds no weights.
    """
    if not adapter.deltas:
        raise DiffgraftError("The adapter holds no weights of layers, so there is nothing to resize.")
    shapes = shapes_of(adapter, weights)
    steps = {path: [(delta, 1.0) for delta in deltas] for path, deltas in adapter.deltas.items()}
    return reduced(steps, shapes, size, adapter, weights, device)


def reduced(
    steps: Mapping[str, Steps],
    shapes: Mapping[str, Shape],
    size: RankBudget | None,
    like: Adapter,
    weights: Weights | None = None,
    device: str = "cpu",
) -> Reduced:
    """Each module's steps as one LoRA; metadata, words and networks are those of `like`.

    Differences of biases, norms and embeddings have no LoRA that programs apply; they are left out, and listed.
    """
    deltas: dict[str, tuple[Delta, ...]] = {}
    lost: dict[str, float] = {}
    dropped: list[str] = []
    for path, own in track(steps.items(), "modules", min_items=20):
        if len(shapes[path]) < 2 or is_embedding(path):
            dropped.append(path)
            continue
        if any("diff_b" in delta.leaves for delta, _ in own):
            dropped.append(f"{path}.bias")
        found = smaller(path, own, shapes[path], size, weights, device)
        lora = found.lora(shapes[path])
        lost[path] = found.lost
        if lora is not None:
            deltas[path] = (lora,)
    said = {key: value for key, value in like.metadata.items() if key not in ("rank", "alpha", FOREIGN)}
    if kept := still_true(like.metadata.get(FOREIGN)):
        said[FOREIGN] = kept
    method = "locon" if any(len(shapes[path]) > 2 and max(shapes[path][2:]) > 1 for path in deltas) else "lora"
    ranks = {next(iter(own)).leaves["lora_down"].shape[0] for own in deltas.values() if own[0].is_lora}
    said |= {"method": "pivotal" if like.tokens else method}
    if len(ranks) == 1:
        said |= {"rank": next(iter(ranks)), "alpha": float(next(iter(ranks)))}
    return Reduced(Adapter(deltas, said, like.networks, like.tokens), lost, tuple(dropped))


def rank_of(delta: Delta) -> int:
    """The rank of a LoRA, with or without DoRA; 0 of other kinds, whose rank as a LoRA is another."""
    return delta.leaves["lora_down"].shape[0] if delta.is_lora else 0


def smaller(
    path: str, steps: Steps, shape: Shape, size: RankBudget | None, weights: Weights | None, device: str
) -> LowRankApproximation:
    """The nearest matrix of that size to what all steps add to one weight."""
    product = as_product(steps, shape)
    if product is not None:
        return nearest_to_product(product[0].to(device), product[1].to(device), size or ALL)
    otherwise = ALL if all(delta.is_low_rank for delta, _ in steps) else NEARLY_ALL
    return nearest(as_matrix(path, steps, shape, weights, device).flatten(1), size or otherwise)
