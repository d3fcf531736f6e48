"""What an outside package adds: a method, a dialect and an objective, each found through an entry point alone."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dialect import Contents, Dialect
from diffgraft.adapters.factors import FactorDelta, FactorLayer, Factors, Leaves, Shape
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.patch import AttachedLayers
from diffgraft.adapters.registry import read_delta
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.objectives.captioned import Captioned
from diffgraft.trainers.objectives.objective import ObjectiveKind

ENTRY_POINTS = {
    "diffgraft.methods": ("rows", "METHOD"),
    "diffgraft.dialects": ("piped", "DIALECT"),
    "diffgraft.objectives": ("doubled", "OBJECTIVE"),
}
"""Group → name and attribute of its one entry point"""


class Rows(Factors):
    """One number for each output, added to its whole row of the weight."""

    kind = "rows"

    def init_leaves(self, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        return {"rows": torch.zeros(shape[0])}

    def rank(self, leaves: Leaves) -> int:  # noqa: ARG002
        return 1

    def weight(self, leaves: Leaves, shape: Shape) -> Tensor:
        return leaves["rows"].view(-1, *[1] * (len(shape) - 1)).expand(shape)


def attach(target: Any, spec: Spec) -> Attached:
    return AttachedLayers(target, spec, lambda path, layer, rng: FactorLayer(Rows(), layer, 1, 1.0, rng))  # noqa: ARG005


def read_rows(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    if set(leaves) != {"rows"} or leaves["rows"].ndim != 1:
        raise ValueError(f"{', '.join(sorted(leaves))} are not a single row of numbers")
    return FactorDelta(Rows(), dict(leaves), 1.0 if alpha is None else alpha)


METHOD = Method(name="rows", summary="one number for each output", attach=attach, read=read_rows)


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    return "piped" in header


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layers: int | None = None) -> Adapter:  # noqa: ARG001
    said = json.loads(header["piped"])
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, leaf = key.split("|")
        found.setdefault(path, {})[leaf] = value
    deltas = {path: (read_delta(*said["kinds"][path][:1], own, said["kinds"][path][1]),) for path, own in found.items()}
    return Adapter(deltas, said["metadata"])


def write(adapter: Adapter) -> Contents:
    if adapter.tokens or any(len(own) != 1 for own in adapter.deltas.values()):
        raise ValueError("it holds words, or several deltas of one module")
    tensors = {
        f"{path}|{name}": leaf.contiguous()
        for path, (own,) in adapter.deltas.items()
        for name, leaf in own.leaves.items()
    }
    kinds = {path: (own.kind, own.alpha) for path, (own,) in adapter.deltas.items()}
    return tensors, {"piped": json.dumps({"kinds": kinds, "metadata": dict(adapter.metadata)})}


DIALECT = Dialect(
    name="piped", summary="paths and leaves with a pipe between", recognises=recognises, read=read, write=write
)


class Doubled(Captioned):
    """Twice the loss of images under their own prompts."""

    def losses(self, predict: Predict, sample_index: int, count: int) -> dict[str, Tensor]:
        return {name: 2 * loss for name, loss in super().losses(predict, sample_index, count).items()}


OBJECTIVE = ObjectiveKind("doubled", "twice the loss of `captioned`", build=Doubled)
