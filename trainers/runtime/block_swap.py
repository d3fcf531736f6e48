"""Block swap: the last blocks of a frozen denoiser wait in main memory, and are on the device only while they compute.

As ``blocks_to_swap`` in sd-scripts and musubi-tuner. The weights are frozen, so they are copied to the device and never
back. Two slots on the device hold one block each: one computes, while the next is copied into the other on a stream of
its own. The slots are allocated once, so that their memory does not grow if the processor runs ahead of the device.

With gradient checkpointing a block computes again in the backward pass, directly before its gradients are computed.
Autograd finishes one block before it begins the one in front of it, and a slot is reused two blocks later, so a weight
is there as long as gradients need it, also where a layer reads it again (as those of `diffgraft.bases.quantized` do).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.bases.quantized import Quantize, Quantized, bytes_when_quantized
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.recipe.groups import RuntimeSettings
from diffgraft.trainers.runtime.checkpointing import is_checkpointed
from diffgraft.trainers.runtime.shards import trains_denoiser

_SLOTS = 2
_ALIGNMENT = 256
"""Bytes whose multiples are the places of weights in a slot, as for memory that CUDA allocates"""


def check_swap_settings(runtime: RuntimeSettings) -> None:
    """Check that block swap is not combined with settings that need the blocks on the device.

    Raises:
        DiffgraftError: it is combined with such a setting, or gradient checkpointing is off.
    """
    if not runtime.block_swap:
        return
    if not runtime.gradient_checkpointing:
        raise DiffgraftError(
            f"block_swap={runtime.block_swap} needs gradient_checkpointing=true: otherwise all blocks stay on the "
            "device until their gradients are computed. Set it, or remove block_swap."
        )
    for key, value, is_set in (
        ("compile", "true", runtime.compile),
        ("shard", runtime.shard, runtime.shard != "none"),
    ):
        if is_set:
            raise DiffgraftError(
                f"{key}={value} cannot be combined with block_swap={runtime.block_swap}: remove one of them."
            )


def check_swap(count: int, base: Base) -> None:
    """Check that the base has blocks that can be swapped, and as many.

    Raises:
        DiffgraftError: it does not.
    """
    if count > (known := len(_blocks(base))):
        raise DiffgraftError(
            f"Invalid value block_swap={count}: the {base.family.denoiser} of this base has {known} blocks. "
            f"Use {known} or less."
        )


def check_swap_frozen(count: int, base: Base, live: Attached) -> None:
    """Check that the denoiser is frozen, as its blocks are never copied back.

    Raises:
        DiffgraftError: the attached method trains the denoiser's own weights.
    """
    if count and trains_denoiser(base, live):
        raise DiffgraftError(
            f"block_swap={count} needs a frozen denoiser, but this method trains the denoiser's own weights: remove "
            "block_swap, or use another method, such as lora."
        )


def swapped_blocks(base: Base, count: int) -> list[nn.Module]:
    """Return the last `count` blocks of the denoiser."""
    return _blocks(base)[-count:] if count else []


def swapped_bytes(base: Base, count: int, quantize: Quantize) -> tuple[int, int]:
    """Return the bytes of the swapped blocks in main memory, and those of the slots on the device.

    Args:
        base: the base, which may be on the device ``meta``.
        count: number of swapped blocks.
        quantize: the quantization of the base's weights.
    """
    sizes = [bytes_when_quantized(block, quantize) for block in swapped_blocks(base, count)]
    return sum(sizes), min(_SLOTS, len(sizes)) * max(sizes, default=0)


def _blocks(base: Base) -> list[nn.Module]:
    """Return the blocks of the denoiser in the order in which they compute."""
    kinds = base.family.checkpointed
    return [module for module in base.denoiser.modules() if type(module).__name__ in kinds]


@contextmanager
def block_swap(base: Base, count: int, device: torch.device) -> Iterator["BlockSwap | None"]:
    """Within the block the last `count` blocks of the denoiser wait in main memory, and compute on `device`.

    Moving the denoiser to another device leaves them where they are.
    """
    if not count:
        yield None
        return
    swap = BlockSwap(swapped_blocks(base, count), device)
    hooks: list[RemovableHandle] = [base.denoiser.register_forward_hook(swap.after_prediction, always_call=True)]
    for index, block in enumerate(swap.blocks):
        come = lambda *_, index=index: swap.bring(index)  # noqa: E731
        hooks.append(block.register_forward_pre_hook(come, prepend=True))
    try:
        yield swap
    finally:
        for hook in hooks:
            hook.remove()
        swap.close()


@dataclass
class _Slot:
    """Memory on the device for the weights of one block."""

    memory: Tensor
    """[bytes], uint8"""
    block: int | None = None
    """Index of the block in it"""
    copied: Any = field(default=None, repr=False)
    """CUDA event after the copy of that block"""


class BlockSwap:
    """Blocks in main memory, and the slots on the device that they compute in.

    On a processor the slots are in main memory as well: nothing is saved, but everything happens as on a GPU.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Move the weights of `blocks` to main memory; the rest of them, such as buffers, to `device`."""
        self.blocks, self.device, self.loads = blocks, device, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._weights = [[(value, _on_host(value.data, device)) for value in block.parameters()] for block in blocks]
        for block, weights in zip(blocks, self._weights, strict=True):
            _scales_to(block, device)
            block._apply = lambda *_, own=block: own  # type: ignore[method-assign]  # what `to` calls
            for value, host in weights:
                value.data = host
        size = max(sum(_room(host) for _, host in weights) for weights in self._weights)
        count = min(_SLOTS, len(blocks))
        self.slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._latest = 0
        """Index of the block that computed last"""

    def resident(self) -> int:
        """Return the bytes of the weights that are on the device now."""
        weights = (self._weights[slot.block] for slot in self.slots if slot.block is not None)
        return sum(host.nbytes for own in weights for _, host in own)

    def bring(self, index: int) -> None:
        """Have the weights of a block on the device, and begin to copy those of the block that will be called next.

        Raises:
            DiffgraftError: the block is not checkpointed, so that its gradients would need weights that have left.
        """
        if torch.is_grad_enabled() and not is_checkpointed():
            raise DiffgraftError(
                f"Gradient checkpointing leaves out a {type(self.blocks[index]).__name__} of this base, so that it "
                "cannot be swapped: remove block_swap."
            )
        slot = self._load(index, self._latest)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        # a forward pass counts up, a backward pass down, and both meet at the last block
        following = index + 1 if index > self._latest or not index else index - 1
        self._latest = index
        if following in range(len(self.blocks)):
            self._load(following, index)

    def after_prediction(self, *_: Any) -> None:
        """Release the device's weights after a prediction without gradients: the adapters may be merged anew then."""
        if not torch.is_grad_enabled():
            self.release()

    def release(self) -> None:
        """Have the weights of all blocks in main memory, where adapters can be merged into them."""
        for slot in self.slots:
            self._empty(slot)

    def close(self) -> None:
        """Leave the blocks in ordinary main memory, and free the slots."""
        self.release()
        if self._stream is not None:
            self._stream.synchronize()
        self.slots = []
        for block, weights in zip(self.blocks, self._weights, strict=True):
            del block._apply
            for value, host in weights:
                value.data = host.clone() if host.is_pinned() else host
            _scales_to(block, torch.device("cpu"))
        self._weights = []

    @torch.no_grad()
    def _load(self, index: int, in_use: int) -> _Slot:
        """Return the slot with the weights of a block, which are copied if need be, but not over those `in_use`."""
        for slot in self.slots:
            if slot.block == index:
                return slot
        slot = next((slot for slot in self.slots if slot.block is None), None) or next(
            (slot for slot in self.slots if slot.block != in_use), self.slots[0]
        )
        self._empty(slot)
        if self._stream is None:
            self._copy(slot, index)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # what computed in this slot has ended
            with torch.cuda.stream(self._stream):
                self._copy(slot, index)
            slot.copied = self._stream.record_event()
        slot.block = index
        self.loads += 1
        return slot

    def _copy(self, slot: _Slot, index: int) -> None:
        start = 0
        for value, host in self._weights[index]:
            place = slot.memory[start : start + host.nbytes].view(host.dtype).view(host.shape)
            value.data = place.copy_(host, non_blocking=True)
            start += _room(host)

    def _empty(self, slot: _Slot) -> None:
        if slot.block is not None:
            for value, host in self._weights[slot.block]:
                value.data = host
        slot.block = None


def _room(value: Tensor) -> int:
    """Return the bytes that a weight takes in a slot."""
    return -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT


def _on_host(value: Tensor, device: torch.device) -> Tensor:
    """Return a weight in main memory; for a GPU it is pinned, as copies beside computation need."""
    host = value.contiguous().cpu()
    return host.pin_memory() if device.type == "cuda" else host


def _scales_to(block: nn.Module, device: torch.device) -> None:
    """Move the buffers of a block, and the scales of its quantized weights, which are small and stay on the device."""
    for module in block.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        if isinstance(module, Quantized):
            module.move_scales(device)
