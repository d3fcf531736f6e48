"""What a step will take, found out on a base without weights: numbers that train, memory, arithmetic."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.bases.quantized import Quantize, held_bytes
from diffgraft.third_party import quiet_libraries
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.groups import OptimSettings

STATES = {
    "adamw": 8.0,
    "adamw8bit": 2.0,
    "lion": 4.0,
    "lion8bit": 1.0,
    "adafactor": 0.1,
    "prodigy": 16.0,
    "schedule-free": 8.0,
}
"""Optimiser → bytes it keeps for each number that trains; 8-bit ones keep small tensors in 32"""


_HEADER, _ENTRY = 700, 150
"""Bytes of a file's metadata, and of the name, shape and place of each of its tensors"""


@dataclass(frozen=True)
class Cost:
    """What training takes; memory in bytes, of tensors alone."""

    trained: int
    """Numbers that train"""
    entries: int
    """Tensors of the adapter's file, about: those that train, and for each module its alpha"""
    weights: int
    """Bytes of the frozen networks that stay while it trains"""
    training: int
    """Bytes of what trains: values, gradients, the optimiser's state, a moving average"""
    activations: int
    """Bytes kept for the backward pass, at their peak"""
    step: float
    """Floating-point operations of an optimiser step"""
    picture: float
    """Floating-point operations of one pass of the denoiser without gradients, for one picture"""

    @property
    def file(self) -> int:
        """Bytes of the adapter's file, about: its numbers in float32, and a header that names each tensor."""
        return 4 * self.trained + _HEADER + _ENTRY * self.entries

    @property
    def memory(self) -> int:
        return self.weights + self.training + self.activations


@dataclass(frozen=True)
class Workload:
    """What a step computes."""

    size: tuple[int, int]
    """Width and height of its pictures in pixels"""
    prompts: Sequence[str]
    pictures: int
    """How many of them are in a batch, class images included"""
    accumulate: int
    """Batches for one optimizer step"""
    checkpointing: bool
    """Whether activations are computed anew on the way back"""


def cost(
    base: Base, attach: Callable[[], Attached], work: Workload, optim: OptimSettings, quantize: Quantize, *, whole: bool
) -> Cost:
    """The cost of training what `attach` lays over an outline; `whole` prompts are read in pieces."""
    sizes = {name: held_bytes(part, quantize if name != "vae" else "none") for name, part in base.parts()}
    dtype, live = base.denoiser.dtype, attach()
    training = {name: value for name, value in live.trainable().items() if value.requires_grad}
    trained = sum(value.numel() for value in training.values())
    entries = len(training) + len({name.rpartition(".")[0] for name in training} - {""})
    stays = {base.family.denoiser, *(base.text_encoders() if live.affects_text_encoder else ())}
    weights = sum(own for name, own in sizes.items() if name in stays)
    each = 4.0 + 4.0 + STATES[optim.optimizer] + (4.0 if optim.ema else 0.0)
    live.to(dtype=dtype)  # as autocast has it
    base.to(dtype=dtype)
    denoiser = Denoiser(base, live, live.trains_text, whole=whole)
    width, height = (side // base.vae_scale_factor for side in work.size)
    channels = base.latents.channels

    def asked(count: int) -> tuple[Tensor, Tensor, list[str]]:
        noisy = torch.empty(count, channels, height, width, device=base.device)
        times = torch.zeros(count, dtype=torch.long, device=base.device)
        return noisy, times, [work.prompts[number % len(work.prompts)] for number in range(count)]

    with FlopCounterMode(display=False) as forward, torch.no_grad(), _fused_attention():
        denoiser(*asked(1))
    fixed = {value.untyped_storage()._cdata for value in denoiser.parameters()}
    at_once = 0
    if work.checkpointing:
        with _fused_attention(), _kept(fixed) as kept, _growth(base.denoiser, base.family.checkpointed, kept) as grown:
            denoiser(*asked(work.pictures))
        at_once = max(grown)  # on the way back one of them at a time has all of its own again
        base.denoiser.enable_gradient_checkpointing()
        base.denoiser.train()
    with _fused_attention(), FlopCounterMode(display=False) as all_of_it, _kept(fixed) as kept:
        denoiser(*asked(work.pictures)).square().mean().backward()
    live.detach()
    step = all_of_it.get_total_flops() * work.accumulate
    return Cost(trained, entries, weights, int(trained * each), kept.peak + at_once, step, forward.get_total_flops())


def speed(base: Base, device: torch.device) -> float:
    """Floating-point operations a second that a part of the denoiser, its weights random, reaches on `device`."""
    block, shapes, width = base.family.timing_block(base)
    with quiet_libraries():
        block = copy.deepcopy(block).to_empty(device=device)
    for value in block.parameters():
        nn.init.normal_(value, std=0.02)
    side, dtype = base.family.native_size(base), base.denoiser.dtype
    given = {name: torch.randn(*shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    x = torch.randn(1, width, side, side, device=device, dtype=dtype)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counted:
            block(x, **given)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            block(x, **given)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return float(counted.get_total_flops() / min(times))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within the block attention keeps on ``meta`` what it does on devices, where it is one operation.

    PyTorch takes it apart there, into square matrices. Diffusers asks for it by its name in the module each time.
    """
    usual = F.scaled_dot_product_attention

    def fused(*args: Any, **more: Any) -> Tensor:
        is_plain = len(args) == 3 and more.get("attn_mask") is None and args[0].ndim == 4
        if is_plain and args[0].is_meta:
            found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
            return found
        return usual(*args, **more)

    with patch.object(F, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def _growth(denoiser: nn.Module, blocks: Sequence[str], kept: "_Kept") -> Iterator[list[int]]:
    """Within the block, what each of those modules adds to what is kept."""
    grown: list[int] = []
    before: list[int] = []
    hooks = []
    for module in denoiser.modules():
        if type(module).__name__ in blocks:
            hooks.append(module.register_forward_pre_hook(lambda *_: before.append(kept.now)))
            hooks.append(module.register_forward_hook(lambda *_: grown.append(kept.now - before.pop())))
    try:
        yield grown
    finally:
        for hook in hooks:
            hook.remove()


class _Kept:
    """Bytes that autograd keeps, now and at their peak; each piece of memory counts once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def take(self, storage: Any) -> None:
        key = storage._cdata
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def give(self, storage: Any) -> None:
        key = storage._cdata
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= storage.nbytes()


class _Held:
    """One tensor that autograd keeps, until it lets go of it."""

    def __init__(self, value: Tensor, kept: _Kept) -> None:
        self.value, self._storage, self._kept = value, value.untyped_storage(), kept
        kept.take(self._storage)

    def __del__(self) -> None:
        self._kept.give(self._storage)


@contextmanager
def _kept(fixed: set[int]) -> Iterator[_Kept]:
    """Within the block, what autograd keeps is counted, but for storages in `fixed`, which are there anyway."""
    kept = _Kept()

    def pack(value: Tensor) -> Any:
        return value if value.untyped_storage()._cdata in fixed else _Held(value, kept)

    def unpack(held: Any) -> Tensor:
        found: Tensor = held.value if isinstance(held, _Held) else held
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept
