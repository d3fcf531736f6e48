"""Orthogonal fine-tuning of a layer's inputs, as peft and OneTrainer implement it: W' = W · Rᵀ, block by block.

Files hold only the entries of each Q = U − Uᵀ above the diagonal. R is the Cayley transform by its Neumann series,
I + 2 Q + 2 Q² + 2 Q³ + Q⁴, the default of both tools (five terms), as files do not store the number of terms. A
strength interpolates R with I. It is read, merged and converted, but not trained here.
Source: OneTrainer, ``modules/module/oft_utils.py``; Qiu et al. 2025, arXiv:2506.19847.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta


@dataclass(frozen=True)
class OftInputsDelta(Delta):
    """Rotation of the inputs in blocks; for convolutions, of the inputs at all positions of the kernel."""

    leaves: Mapping[str, Tensor]
    """``oft_R`` [blocks, size · (size − 1) / 2], in which a single block is used for all blocks of the layer; with
    ``scaled_oft``, Q is divided by the square root of the number of entries"""

    kind = "oft-inputs"
    alpha = None

    @property
    def size(self) -> int:
        """Number of rows of a block."""
        return _size(self.leaves["oft_R"].shape[1])

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight, above = weight.float(), self.leaves["oft_R"].float().to(weight.device)
        if "scaled_oft" in self.leaves:
            above = above / above.shape[1] ** 0.5
        size = self.size
        rows, columns = torch.triu_indices(size, size, 1, device=weight.device)
        upper = torch.zeros(above.shape[0], size, size, device=weight.device)
        upper[:, rows, columns] = above
        q, identity = upper - upper.transpose(1, 2), torch.eye(size, device=weight.device)
        square = q @ q
        rotations = identity + 2 * q + 2 * square + 2 * square @ q + square @ square
        rotations = strength * rotations + (1 - strength) * identity
        blocks = weight.reshape(weight.shape[0], -1, size)  # [out, blocks, size]
        rotations = rotations.expand(blocks.shape[1], size, size)
        return torch.einsum("onk,nck->onc", blocks, rotations).reshape(weight.shape), bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        width, count = math.prod(weight_shape[1:]), self.leaves["oft_R"].shape[0]
        return len(weight_shape) > 1 and width % self.size == 0 and count in (1, width // self.size)


def _size(entries: int) -> int:
    """Number of rows of a square matrix with this number of entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  (a rotation has no scale)
    """Build OFT on inputs from its leaves. Raises ValueError for invalid leaves."""
    above = leaves.get("oft_R")
    if above is None or not set(leaves) <= {"oft_R", "scaled_oft"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of OFT on inputs")
    if above.ndim != 2 or above.numel() == 0 or math.comb(_size(above.shape[1]), 2) != above.shape[1]:
        raise ValueError(f"oft_R has shape {list(above.shape)}; expected the entries above the diagonals of squares")
    return OftInputsDelta(dict(leaves))


KINDS = {"oft-inputs": read}
