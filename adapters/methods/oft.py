"""Orthogonal fine-tuning (OFT): the outputs of a layer are rotated in blocks (Qiu et al. 2023, arXiv:2306.07280).

A rotation R is the Cayley transform (I + Q)(I − Q)⁻¹ of Q = X − Xᵀ; if alpha is not 0, Q is shrunk to a norm of at most
alpha · out. A strength interpolates each R with I, as in LyCORIS. `boft.py` has the variant with several stages.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import scaled, without_bias
from diffgraft.adapters.method import Attached, Method, Options, Spec
from diffgraft.adapters.methods.lokr import factorize
from diffgraft.adapters.patch import AdapterLayer, AttachedLayers, is_autocast, run_layer, to_cpu_float32, weight_shape
from diffgraft.bases.quantized import weight_and_bias
from diffgraft.errors import DiffgraftError


def cayley(blocks: Tensor, bound: float) -> Tensor:
    """Return R − I for the rotations R of ``oft_blocks`` [..., b, b]; the norm of all Q is at most `bound` (0: any).

    R − I = 2 Q (I − Q)⁻¹, as precise for small rotations as for large ones.
    """
    exactly = torch.autocast(blocks.device.type, enabled=False) if is_autocast(blocks.device) else nullcontext()
    with exactly:  # rounded to half precision they are no rotations
        q = blocks - blocks.transpose(-1, -2)
        if bound > 0:
            q = q * (bound / (q.norm() + 1e-8)).clamp(max=1)
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        turned: Tensor = 2 * q @ torch.linalg.inv(identity - q)
    return turned


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
        turned = cayley(blocks, self.alpha * weight.shape[0])
        rotated = weight + rotation_change(strength * turned, weight)
        if "rescale" in self.leaves:
            rotated = rotated * self.leaves["rescale"].float().to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        return rotated, bias

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        *stages, count, size, _ = self.leaves["oft_blocks"].shape
        scale = self.leaves.get("rescale")
        return (
            len(weight_shape) > 1
            and all(size * 2 ** (stage - 1) <= weight_shape[0] and count.bit_count() == 1 for stage in stages)
            and count * size == weight_shape[0]
            and (scale is None or scale.numel() == weight_shape[0])
        )


def rotation_change(turned: Tensor, rows: Tensor) -> Tensor:
    """Return what rotations R add to rows [out, …], of a weight or of outputs.

    Args:
        turned: R − I, [n, b, b] (OFT; files of this kind hold Rᵀ), or [stages, n, b, b] (BOFT).
        rows: rows that are rotated; stage i of BOFT mixes those at a distance of 2^i · b / 2.
    """
    if turned.ndim == 3:
        flat = rows.reshape(*turned.shape[:2], -1)
        return (turned.transpose(1, 2) @ flat).view(rows.shape)
    now = rows.flatten(1)
    change = torch.zeros_like(now)
    size = turned.shape[-1]
    for stage, blocks in enumerate(turned):
        step = 2**stage * (size // 2)
        mixed = now.view(-1, 2, step, now.shape[1]).transpose(1, 2).reshape(-1, size, now.shape[1])
        moved = (blocks @ mixed).view(-1, step, 2, now.shape[1]).transpose(1, 2).reshape(now.shape)
        now, change = now + moved, change + moved
    return change.view(rows.shape)


class OftOptions(Options):
    """Options of OFT and BOFT beside rank, which is the side of the blocks (at most, for OFT)."""

    constraint: float = Field(0.0, ge=0)
    """Bound on the norm of all Q of a layer, as a multiple of its number of outputs (0: no bound); it keeps the
    rotations near to the start"""
    rescaled: bool = False
    """Learn a factor for each output as well"""


class RotationLayer(AdapterLayer):
    """Rotations of a live layer's outputs, without their bias."""

    has_strength = False

    def __init__(self, layer: nn.Module, blocks: tuple[int, ...], options: OftOptions) -> None:
        """Start without a rotation.

        Args:
            layer: the layer that is adapted.
            blocks: shape of ``oft_blocks``: [n, b, b] or [stages, n, b, b].
            options: bound and rescaling.
        """
        super().__init__()
        out, *rest = weight_shape(layer)
        self.leaves = nn.ParameterDict({"oft_blocks": nn.Parameter(torch.zeros(blocks))})
        if options.rescaled:
            self.leaves["rescale"] = nn.Parameter(torch.zeros(out, *[1] * len(rest)))  # less 1, where decay leads to
        self._alpha = options.constraint
        self._has_own_bound = "constraint" in options.model_fields_set

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        turned = cayley(self.leaves["oft_blocks"].float(), self._alpha * weight_shape(layer)[0]).to(out.dtype)
        plain = without_bias(layer, out)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # rows of other groups see other inputs
            change = run_layer(layer, x, rotation_change(turned, weight_and_bias(layer)[0]))
        else:
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            change = rotation_change(turned, plain.transpose(0, axis)).transpose(0, axis)
        if "rescale" in self.leaves:
            change = change + scaled(layer, plain + change, self.leaves["rescale"])
        return out + change

    def load(self, delta: Delta, layer: nn.Module) -> None:
        if not isinstance(delta, OftDelta):
            raise ValueError(f"is a {delta.kind}, but this run trains rotations of outputs")
        if not delta.fits(weight_shape(layer)) or delta.leaves["oft_blocks"].ndim != self.leaves["oft_blocks"].ndim:
            raise ValueError(f"is a {delta.kind} that does not fit this layer or this method")
        device = self.leaves["oft_blocks"].device
        values = {name: leaf.to(device, torch.float32, copy=True) for name, leaf in delta.leaves.items()}
        if "rescale" in values:
            values["rescale"] -= 1
        own = {name: leaf.detach() for name, leaf in self.leaves.items()}
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in {**own, **values}.items()})
        if not self._has_own_bound:
            self._alpha = delta.alpha

    def delta(self) -> OftDelta:
        leaves = to_cpu_float32(dict(self.leaves.items()))
        if "rescale" in leaves:
            leaves["rescale"] = 1 + leaves["rescale"]
        return OftDelta(leaves, self._alpha)


def attach(target: Any, spec: Spec) -> Attached:
    def make(path: str, layer: nn.Module, generator: torch.Generator) -> AdapterLayer:  # noqa: ARG001  (zeros)
        side, count = factorize(weight_shape(layer)[0], spec.rank)
        if side == 1:
            raise DiffgraftError(
                f"OFT cannot adapt {path}: with rank={spec.rank} its {count} outputs are blocks of one, which cannot "
                "be rotated. Set a larger rank, such as 8."
            )
        return RotationLayer(layer, (count, side, side), spec.options)

    return AttachedLayers(target, spec, make)


NO_ALPHA = {"alpha": "rotations have no scale; options.constraint bounds them"}


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


METHOD = Method(
    name="oft",
    summary="rotations of a layer's outputs in blocks, which keep the angles between its weights",
    attach=attach,
    options=OftOptions,
    unsupported=NO_ALPHA,
    read=read,
)
