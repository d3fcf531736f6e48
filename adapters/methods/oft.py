"""Orthogonal fine-tuning: the outputs of a layer are rotated in blocks (OFT), or in several stages of blocks (BOFT).

OFT is from Qiu et al. 2023, arXiv:2306.07280; BOFT, with stages that mix ever wider blocks, from Liu et al. 2023,
arXiv:2311.06243. A rotation R is the Cayley transform (I + Q)(I − Q)⁻¹ of Q = X − Xᵀ; if alpha is not 0, Q is shrunk to
a norm of at most alpha · out. A strength interpolates each R with I, as in LyCORIS. It is read, merged and converted,
but not trained here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta


def cayley(blocks: Tensor, bound: float) -> Tensor:
    """Rotations [..., b, b] from ``oft_blocks`` [..., b, b]; the norm of all Q is at most `bound` (0: no limit)."""
    q = blocks - blocks.transpose(-1, -2)
    norm = float(q.norm()) + 1e-8
    if 0 < bound < norm:
        q = q * (bound / norm)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotations: Tensor = (identity + q) @ torch.linalg.inv(identity - q)
    return rotations


@dataclass(frozen=True, repr=False)
class OftDelta(Delta):
    """W' = R · W, block by block (Rᵀ · W in files of kind OFT); ``rescale``, if there, then multiplies each output."""

    leaves: Mapping[str, Tensor]
    """``oft_blocks`` [n, b, b] of OFT, or [stages, n, b, b] of BOFT; optionally ``rescale`` [out, 1, …]"""
    alpha: float
    """Bound on ‖Q‖, as a multiple of the number of outputs; 0: no bound"""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "oft" if self.leaves["oft_blocks"].ndim == 3 else "boft"

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        blocks = self.leaves["oft_blocks"].float().to(weight.device)
        rotations = cayley(blocks, self.alpha * weight.shape[0])
        identity = torch.eye(rotations.shape[-1], device=weight.device)
        rotations = strength * rotations + (1 - strength) * identity
        if rotations.ndim == 3:
            rows = weight.view(*rotations.shape[:2], -1)
            rotated = torch.einsum("knm,kni->kmi", rotations, rows).reshape(weight.shape)
        else:
            rotated = _butterfly(rotations, weight)
        if "rescale" in self.leaves:
            rotated = rotated * self.leaves["rescale"].float().to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        return rotated, bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        *_, count, size, _ = self.leaves["oft_blocks"].shape
        scale = self.leaves.get("rescale")
        return (
            len(weight_shape) > 1
            and count * size == weight_shape[0]
            and (scale is None or scale.numel() == weight_shape[0])
        )


def _butterfly(rotations: Tensor, weight: Tensor) -> Tensor:
    """Rotate weight [out, …] by rotations [stages, n, b, b]; stage i mixes rows at a distance of 2^i · b / 2."""
    rotated = weight.flatten(1)
    size = rotations.shape[-1]
    for stage, blocks in enumerate(rotations):
        step = 2**stage * (size // 2)
        mixed = rotated.view(-1, 2, step, rotated.shape[1]).transpose(1, 2).reshape(-1, size, rotated.shape[1])
        mixed = blocks @ mixed
        rotated = mixed.view(-1, step, 2, rotated.shape[1]).transpose(1, 2).reshape(rotated.shape)
    return rotated.view(weight.shape)


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """Build OFT or BOFT from its leaves; without an alpha Q has no bound. Raises ValueError for invalid leaves."""
    blocks = leaves.get("oft_blocks")
    if blocks is None or not set(leaves) <= {"oft_blocks", "rescale"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of OFT or BOFT")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or blocks.numel() == 0:
        raise ValueError(f"oft_blocks has shape {list(blocks.shape)}; expected square blocks")
    if blocks.ndim == 4 and blocks.shape[-1] % 2:
        raise ValueError(f"oft_blocks has shape {list(blocks.shape)}; blocks of BOFT must have an even size")
    return OftDelta(dict(leaves), alpha or 0.0)


KINDS = {"oft": read, "boft": read}
