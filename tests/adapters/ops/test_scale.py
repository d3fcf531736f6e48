"""Work on files of real sizes takes seconds."""

import time

import pytest
import torch

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.full import FullDelta
from diffgraft.adapters.loha import HADAMARD
from diffgraft.adapters.lora import LOW_RANK
from diffgraft.adapters.lowrank import Size
from diffgraft.adapters.ops.combine import combine
from diffgraft.adapters.ops.inspect import inspect
from diffgraft.adapters.ops.resize import resize
from diffgraft.bases.shapes import layer_shapes

SECONDS = 60


@pytest.mark.scale
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_files_of_real_sizes(family: str) -> None:
    """LoRA of rank 32 and LoHa of rank 8 on all layers; and the difference of all weights, at a rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = {p: s for p, s in layer_shapes(family).items() if len(s) in (2, 4) and not p.endswith("_embedding")}
    made: dict[str, Adapter] = {}
    for name, factors, rank in (("lora", LOW_RANK, 32), ("loha", HADAMARD, 8)):
        deltas = {}
        for path, shape in shapes.items():
            start = factors.start(shape, rank, generator)
            leaves = {key: 0.02 * torch.randn(leaf.shape, generator=generator) for key, leaf in start.items()}
            deltas[path] = (FactorDelta(factors, leaves, float(rank)),)
        made[name] = Adapter(deltas, {"method": name, "base": {"family": family}})
    took: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        took[name] = time.perf_counter() - start

    start = time.perf_counter()
    resize(made["lora"], Size(rank=8))
    timed("resize a LoRA", start)
    start = time.perf_counter()
    resize(made["loha"], Size(energy=0.9))
    timed("resize a LoHa by energy", start)
    start = time.perf_counter()
    combine([("one", made["lora"], 0.5), ("two", made["loha"], 0.5)])
    timed("combine both", start)
    start = time.perf_counter()
    inspect(made["loha"])
    timed("inspect a LoHa", start)
    if family == "sd1":
        full = {p: (FullDelta({"diff": torch.randn(s, generator=generator)}),) for p, s in shapes.items()}
        start = time.perf_counter()
        resize(Adapter(full, {"base": {"family": family}}), Size(rank=16))
        timed("reduce all weights to rank 16", start)
    assert max(took.values()) < SECONDS, took
