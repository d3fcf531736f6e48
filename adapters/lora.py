"""LoRA: a low-rank matrix added to the weight (Hu et al. 2021, arXiv:2106.09685).

W' = W + (alpha / r) · up · down, with down [r, in] and up [out, r]; equation (3) and section 4.1 of the paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Delta, LinearDelta
from diffgraft.adapters.method import Method
from diffgraft.quiet import hushed


def lora_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """ΔW = scale · up · down; down [r, in, …kernel], up [out, r, …ones] → [out, in, …kernel]."""
    flat = up.flatten(1) @ down.flatten(1)
    return scale * flat.view(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class LoraDelta(LinearDelta):
    """LoRA on one linear layer or convolution."""

    down: Tensor
    """[r, in] or [r, in, k, k]"""
    up: Tensor
    """[out, r] or [out, r, 1, 1]"""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        return lora_delta(self.down.float(), self.up.float(), self.alpha / self.rank)

    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        return (self.up.shape[0], *self.down.shape[1:]) == tuple(weight_shape)


def build(leaves: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """From ``lora_down`` and ``lora_up``; without an alpha the scale is 1."""
    down, up = leaves["lora_down"], leaves["lora_up"]
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] == 0:
        raise ValueError(f"lora_down is {list(down.shape)} and lora_up {list(up.shape)}, which are no factors")
    if any(side != 1 for side in up.shape[2:]):
        raise ValueError(f"lora_up is {list(up.shape)}, but its kernel can only be of size one")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"lora_down has rank {down.shape[0]}, lora_up has rank {up.shape[1]}")
    return LoraDelta(down, up, float(down.shape[0]) if alpha is None else alpha)


class AttachedLora:
    """LoRA on a live module, by peft's tuner."""

    _name = "diffgraft"

    def __init__(self, module: nn.Module, paths: Sequence[str], *, rank: int, alpha: float, seed: int) -> None:
        with hushed():
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths), bias="none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = LoraModel(module, {self._name: config}, self._name)
        self._tuner._cast_adapter_dtype(self._name)  # float32 beside a base of half precision, as in peft's own models
        self._module = module
        self._alpha = alpha

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {path: layer for path, layer in self._module.named_modules() if isinstance(layer, LoraLayer)}

    def parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, nn.Parameter] = {}
        for path, layer in self._layers().items():
            named[f"{path}.lora_down"] = layer.lora_A[self._name].weight
            named[f"{path}.lora_up"] = layer.lora_B[self._name].weight
        return named

    def deltas(self) -> dict[str, Delta]:
        kept = {name: value.detach().float().cpu().clone() for name, value in self.parameters().items()}
        return {
            path: LoraDelta(kept[f"{path}.lora_down"], kept[f"{path}.lora_up"], self._alpha) for path in self._layers()
        }

    def detach(self) -> None:
        self._tuner.unload()


METHOD = Method(
    name="lora",
    summary="a low-rank matrix added to each chosen layer: small, quick, opens everywhere",
    attach=AttachedLora,
)
