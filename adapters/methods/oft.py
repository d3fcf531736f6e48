"""Orthogonal fine-tuning: the outputs of a layer turned, in blocks (OFT) or in several stages of blocks (BOFT).

OFT is of Qiu et al. 2023, arXiv:2306.07280; BOFT, whose stages mix ever wider, of Liu et al. 2023, arXiv:2311.06243. A
rotation R is the Cayley transform (I + Q)(I − Q)⁻¹ of Q = X − Xᵀ, Q shrunk to a norm of at most alpha · out where
alpha is not 0. A strength draws each R towards I, as in LyCORIS. Read, merged and converted; nothing trains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Delta


def cayley(blocks: Tensor, bound: float) -> Tensor:
    """Rotations [..., b, b] of ``oft_blocks`` [..., b, b]; the norm of all Q together is at most `bound`, 0: any."""
    q = blocks - blocks.transpose(-1, -2)
    norm = float(q.norm()) + 1e-8
    if 0 < bound < norm:
        q = q * (bound / norm)
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    found: Tensor = (one + q) @ torch.linalg.inv(one - q)
    return found


@dataclass(frozen=True, repr=False)
class OftDelta(Delta):
    """R · W block by block (in OFT Rᵀ), then each output by ``rescale`` where there is one."""

    leaves: Mapping[str, Tensor]
    """``oft_blocks`` [n, b, b] of OFT, [stages, n, b, b] of BOFT; ``rescale`` [out, 1, …]"""
    alpha: float
    """Bound on ‖Q‖, as a multiple of the number of outputs; 0: none"""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "oft" if self.leaves["oft_blocks"].ndim == 3 else "boft"

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        blocks = self.leaves["oft_blocks"].float().to(weight.device)
        turned = cayley(blocks, self.alpha * weight.shape[0])
        one = torch.eye(turned.shape[-1], device=weight.device)
        turned = strength * turned + (1 - strength) * one
        if turned.ndim == 3:
            rows = weight.view(*turned.shape[:2], -1)
            found = torch.einsum("knm,kni->kmi", turned, rows).reshape(weight.shape)
        else:
            found = _butterfly(turned, weight)
        if "rescale" in self.leaves:
            found = found * self.leaves["rescale"].float().to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        return found, bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        *_, count, size, _ = self.leaves["oft_blocks"].shape
        scale = self.leaves.get("rescale")
        return (
            len(weight_shape) > 1
            and count * size == weight_shape[0]
            and (scale is None or scale.numel() == weight_shape[0])
        )


def _butterfly(turned: Tensor, weight: Tensor) -> Tensor:
    """Stage i turns blocks of rows that lie 2^i · b / 2 apart: rotations [stages, n, b, b], weight [out, …]."""
    found = weight.flatten(1)
    size = turned.shape[-1]
    for stage, blocks in enumerate(turned):
        step = 2**stage * (size // 2)
        mixed = found.view(-1, 2, step, found.shape[1]).transpose(1, 2).reshape(-1, size, found.shape[1])
        mixed = blocks @ mixed
        found = mixed.view(-1, step, 2, found.shape[1]).transpose(1, 2).reshape(found.shape)
    return found.view(weight.shape)


def read(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """From its leaves; without an alpha Q has no bound."""
    blocks = leaves.get("oft_blocks")
    if blocks is None or not set(leaves) <= {"oft_blocks", "rescale"}:
        raise ValueError(f"{', '.join(sorted(leaves))} are not the leaves of OFT or BOFT")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or blocks.numel() == 0:
        raise ValueError(f"oft_blocks is {list(blocks.shape)}, which are no square blocks")
    if blocks.ndim == 4 and blocks.shape[-1] % 2:
        raise ValueError(f"oft_blocks is {list(blocks.shape)}; blocks of BOFT have an even size")
    return OftDelta(dict(leaves), alpha or 0.0)


KINDS = {"oft": read, "boft": read}
