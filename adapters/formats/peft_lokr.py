"""Configuration of peft's LoKr that gives every layer exactly the factors that the adapter has.

peft does not store the factorization of a layer: rank, `decompose_both`, `decompose_factor` and `use_effective_conv2d`
determine it for all layers together.
Source: peft 0.21.2, ``tuners/lokr/layer.py``, ``update_layer`` and ``factorization``.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffgraft.adapters.factors import FactorDelta
from diffgraft.adapters.methods.lokr import factorize

_CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out")
"""Last path components of layers with 3 × 3 kernels in UNets; all other layers are linear, or 1 × 1"""


def lokr_config(
    factors: Mapping[str, FactorDelta],
) -> tuple[dict[str, int], dict[str, float], dict[str, Any]]:
    """Rank and alpha of each layer, and the other fields of the configuration.

    Raises:
        ValueError: no single configuration gives all layers their factors.
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
        expected = {"lokr_w1_a", "lokr_w1_b"} if split_1 else {"lokr_w1"}
        expected |= {"lokr_w2_a", "lokr_w2_b"} if split_2 else {"lokr_w2"}
        expected |= {"lokr_t2"} if split_2 and tucker and _kernel(path) > 1 else set()
        if set(delta.leaves) != expected:
            here, in_peft = (", ".join(sorted(names)) for names in (delta.leaves, expected))
            raise ValueError(f"{path} has {here}; peft's LoKr would have {in_peft}")
    numbers = sorted({side for pairs in sides.values() for pair in pairs for side in pair})
    for factor in (-1, *numbers):
        if all(_factorize_like_peft(math.prod(pair), factor) == pair for pairs in sides.values() for pair in pairs):
            more = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": tucker}
            return ranks, alphas, more
    raise ValueError("its layers have different factors, but peft's LoKr has a single factor for all layers")


def _kernel(path: str) -> int:
    """Kernel size of the layer at `path`."""
    return 3 if path.rpartition(".")[2] in _CONVOLUTIONS else 1


def _sides(path: str, delta: FactorDelta) -> tuple[tuple[int, int], tuple[int, int]]:
    """Factorizations (out_1, out_2) and (in_1, in_2) of the layer's sides."""
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
    """Rank of the delta; for unsplit factors, a rank large enough that peft splits neither factor."""
    if {"lokr_w1", "lokr_w2"} <= set(delta.leaves):
        return max(1, *(math.ceil(side / 2) for pair in sides for side in pair))
    return delta.rank


def _factorize_like_peft(side: int, factor: int) -> tuple[int, int]:
    """`side` as a product of two numbers, as in peft: `factor` comes first if it divides, even if it is the larger."""
    return (factor, side // factor) if factor > 0 and side % factor == 0 else factorize(side, factor)
