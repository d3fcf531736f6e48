"""Orthogonal fine-tuning of a layer's inputs, as peft and OneTrainer have it: W' = W · Rᵀ, block by block.

Of each block only the entries above the diagonal of Q = U − Uᵀ are kept. R is the Cayley transform by its Neumann
series, I + 2 Q + 2 Q² + 2 Q³ + Q⁴, the default of both tools (five terms), which files do not tell. A strength draws R
towards I. Read, merged and converted; nothing trains it.
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
    """Blocks of the inputs turned; of convolutions, of the inputs under all of the kernel."""

    leaves: Mapping[str, Tensor]
    """``oft_R`` [blocks, size · (size − 1) / 2], where one block stands for all of its size; and ``scaled_oft``, where
    Q is divided by the root of the number of entries"""

    kind = "oft-inputs"
    alpha = None

    @property
    def size(self) -> int:
        """Rows of a block."""
        return _size(self.leaves["oft_R"].shape[1])

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight, above = weight.float(), self.leaves["oft_R"].float().to(weight.device)
        if "scaled_oft" in self.leaves:
            above = above / above.shape[1] ** 0.5
        size = self.size
        rows, columns = torch.triu_indices(size, size, 1, device=weight.device)
        upper = torch.zeros(above.shape[0], size, size, device=weight.device)
        upper[:, rows, columns] = above
        q, one = upper - upper.transpose(1, 2), torch.eye(size, device=weight.device)
        square = q @ q
        turned = one + 2 * q + 2 * square + 2 * square @ q + square @ square
        turned = strength * turned + (1 - strength) * one
        blocks = weight.reshape(weight.shape[0], -1, size)  # [out, blocks, size]
        turned = turned.expand(blocks.shape[1], size, size)
        return torch.einsum("onk,nck->onc", blocks, turned).reshape(weight.shape), bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        width, count = math.prod(weight_shape[1:]), self.leaves["oft_R"].shape[0]
        return len(weight_shape) > 1 and width % self.size == 0 and count in (1, width // self.size)


def _size(entries: int) -> int:
    """Rows of a square with so many entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:  # noqa: ARG001  (a rotation has no scale)
    """From its leaves."""
    above = leaves.get("oft_R")
    if above is None or not set(leaves) <= {"oft_R", "scaled_oft"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of OFT on inputs")
    if above.ndim != 2 or above.numel() == 0 or math.comb(_size(above.shape[1]), 2) != above.shape[1]:
        raise ValueError(f"oft_R is {list(above.shape)}, which are no entries above the diagonals of squares")
    return OftInputsDelta(dict(leaves))


KINDS = {"oft-inputs": read}
