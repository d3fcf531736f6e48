"""The configuration of peft's LoKr under which every layer gets the very factors that it has.

peft has no shapes in its files: rank, `decompose_both`, `decompose_factor` and `use_effective_conv2d` say, for all
layers together, how each is divided.
Source: peft 0.21.2, ``tuners/lokr/layer.py``, ``update_layer`` and ``factorization``.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.lokr import divided

_WITH_KERNELS = ("conv", "conv1", "conv2", "conv_in", "conv_out")
"""Last names of the layers with 3 × 3 kernels in UNets; all others are linear, or 1 × 1"""


def settings(
    factors: Mapping[str, FactorDelta],
) -> tuple[dict[str, int], dict[str, float], dict[str, Any]]:
    """Rank and alpha of each layer, and the rest of the configuration.

    Raises:
        ValueError: no one configuration divides all layers as they are.
    """
    sides = {path: _sides(path, delta) for path, delta in factors.items()}
    ranks = {path: _rank(delta, sides[path]) for path, delta in factors.items()}
    alphas = {path: ranks[path] * delta.scale for path, delta in factors.items()}
    both = any("lokr_w1_a" in delta.leaves for delta in factors.values())
    tucker = any("lokr_t2" in delta.leaves for delta in factors.values())
    for path, delta in factors.items():
        (out_1, out_2), (in_1, in_2) = sides[path]
        split_1 = both and ranks[path] < max(out_1, in_1) / 2
        split_2 = ranks[path] < max(out_2, in_2) / 2
        wanted = {"lokr_w1_a", "lokr_w1_b"} if split_1 else {"lokr_w1"}
        wanted |= {"lokr_w2_a", "lokr_w2_b"} if split_2 else {"lokr_w2"}
        wanted |= {"lokr_t2"} if split_2 and tucker and _kernel(path) > 1 else set()
        if set(delta.leaves) != wanted:
            here, there = (", ".join(sorted(names)) for names in (delta.leaves, wanted))
            raise ValueError(f"{path} has {here}, where peft's LoKr would have {there}")
    numbers = sorted({side for pairs in sides.values() for pair in pairs for side in pair})
    for factor in (-1, *numbers):
        if all(_divided(math.prod(pair), factor) == pair for pairs in sides.values() for pair in pairs):
            more = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": tucker}
            return ranks, alphas, more
    raise ValueError("its layers are divided by different factors, and peft's LoKr has one for all")


def _kernel(path: str) -> int:
    return 3 if path.rpartition(".")[2] in _WITH_KERNELS else 1


def _sides(path: str, delta: FactorDelta) -> tuple[tuple[int, int], tuple[int, int]]:
    """(out_1, out_2) and (in_1, in_2)."""
    shapes = {name: tuple(leaf.shape) for name, leaf in delta.leaves.items()}
    if "lokr_w1" in shapes:
        out_1, in_1 = shapes["lokr_w1"]
    else:
        out_1, in_1 = shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1]
    if "lokr_w2" in shapes:
        out_2, in_2 = shapes["lokr_w2"][:2]
    elif "lokr_t2" in shapes:
        out_2, in_2 = shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1]
    else:
        out_2, in_2 = shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1] // _kernel(path) ** 2
    return (out_1, out_2), (in_1, in_2)


def _rank(delta: FactorDelta, sides: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """Its own, or one so large that peft splits nothing."""
    if {"lokr_w1", "lokr_w2"} <= set(delta.leaves):
        return max(1, *(math.ceil(side / 2) for pair in sides for side in pair))
    return delta.rank


def _divided(side: int, factor: int) -> tuple[int, int]:
    """As peft divides: where the factor does, it comes first, even if it is the larger."""
    return (factor, side // factor) if factor > 0 and side % factor == 0 else divided(side, factor)
