"""Butterfly OFT (BOFT): a layer's outputs are rotated in stages of blocks (Liu et al. 2023, arXiv:2311.06243).

Each stage mixes rows that are farther apart, so that a few small blocks make a rotation of all outputs. The rotations
are those of `oft.py`.
"""

from typing import Any

import torch
from torch import nn

from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.methods.oft import NO_ALPHA, OftOptions, RotationLayer, read
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers, weight_shape
from diffgraft.errors import DiffgraftError


def butterfly_blocks(out: int, side: int) -> tuple[int, int, int]:
    """Return number of stages, number of blocks and side of a block for `out` rows.

    The side is even, and the number of blocks a power of two; among these the largest side up to `side`, as LyCORIS
    chooses it, or the smallest one above where none is so small.

    Raises:
        ValueError: `out` is odd.
    """
    if out % 2:
        raise ValueError(f"{out} outputs cannot be split into blocks of an even size")
    sides = [m for m in range(2, out + 1, 2) if out % m == 0 and (out // m).bit_count() == 1]
    chosen = max((m for m in sides if m <= side), default=min(sides))
    count = out // chosen
    return (count - 1).bit_count() + 1, count, chosen


def attach(target: Any, spec: Spec) -> Attached:
    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:  # noqa: ARG001  (zeros)
        try:
            stages, count, side = butterfly_blocks(weight_shape(layer)[0], spec.rank)
        except ValueError as error:
            raise DiffgraftError(f"BOFT cannot adapt {path}: {error}. Choose other layers, or method=oft.") from error
        return RotationLayer(layer, (stages, count, side, side), spec.options)

    return AttachedLayers(target, spec, make)


METHOD = Method(
    name="boft",
    summary="rotations of a layer's outputs in stages of blocks, which mix all outputs with few numbers",
    attach=attach,
    options=OftOptions,
    unsupported=NO_ALPHA,
    read=read,
)
