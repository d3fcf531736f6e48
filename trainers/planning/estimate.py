"""Estimate of a training step's cost on a base without weights: trainable parameters, memory, FLOPs."""

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
from diffgraft.bases import Base, SizeConditioning
from diffgraft.bases.quantized import Quantize, bytes_when_quantized
from diffgraft.third_party import quiet_libraries
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.groups import OptimSettings

STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2.0,
    "lion": 4.0,
    "lion8bit": 1.0,
    "adafactor": 0.1,
    "prodigy": 16.0,
    "schedule-free": 8.0,
}
"""Optimizer → bytes of its state for each trainable parameter; 8-bit optimizers keep small tensors in 32 bits"""

_HEADER_BYTES, _TENSOR_BYTES = 700, 150
"""Bytes of a file's metadata, and of each tensor's name, shape and offset in its header"""
_TIMED, _MOST_RUNS = 0.2, 50
"""Seconds of repeated runs that a small block is timed by, so that one busy moment does not decide; runs at most"""


@dataclass(frozen=True)
class Cost:
    """Cost of training; memory in bytes, of tensors only."""

    trained: int
    """Number of trainable parameters"""
    stored: int
    """Number of values in the adapter's file: the trainable ones, and those that a start fixes"""
    entries: int
    """Approximate number of tensors in the adapter's file: the trainable ones, and an alpha for each module"""
    weights: int
    """Bytes of the frozen networks that stay in memory during training"""
    training: int
    """Bytes of the trainable parameters with their gradients, optimizer state and EMA"""
    activations: int
    """Bytes of the activations kept for the backward pass, at their peak"""
    step: float
    """FLOPs of an optimizer step"""
    image: float
    """FLOPs of a forward pass of the denoiser for one image"""

    @property
    def file(self) -> int:
        """Approximate bytes of the adapter's file: its tensors in float32, and a header with an entry for each."""
        return 4 * self.stored + _HEADER_BYTES + _TENSOR_BYTES * self.entries

    @property
    def memory(self) -> int:
        """Bytes of device memory at the peak of a step."""
        return self.weights + self.training + self.activations


@dataclass(frozen=True)
class Workload:
    """Inputs of a training step."""

    size: tuple[int, int]
    """Width and height of the images in pixels"""
    prompts: Sequence[str]
    """Prompts, used in turn"""
    images: int
    """Number of images in a micro-batch, including class images"""
    accumulate: int
    """Number of micro-batches in an optimizer step"""
    checkpointing: bool
    """Whether gradient checkpointing is used"""


def estimate_cost(
    base: Base, attach: Callable[[], Attached], work: Workload, optim: OptimSettings, quantize: Quantize, *, whole: bool
) -> Cost:
    """Estimate the cost of training.

    Args:
        base: a base on the meta device.
        attach: attaches the method to `base`.
        work: the inputs of a step.
        optim: the recipe's optimizer settings.
        quantize: the quantization of the base's weights.
        whole: whether long prompts are encoded in chunks.
    """
    sizes = {name: bytes_when_quantized(part, quantize if name != "vae" else "none") for name, part in base.parts()}
    dtype, live = base.denoiser.dtype, attach()
    trainable = {name: value for name, value in live.trainable().items() if value.requires_grad}
    trained = sum(value.numel() for value in trainable.values())
    stored = trained + sum(buffer.numel() for buffer in live.buffers())
    entries = len(trainable) + len({name.rpartition(".")[0] for name in trainable} - {""})
    in_memory = {base.family.denoiser, *(base.prompt_networks() if live.affects_text_encoder else ())}
    weights = sum(size for name, size in sizes.items() if name in in_memory)
    bytes_per_parameter = 4.0 + 4.0 + STATE_BYTES[optim.optimizer] + (4.0 if optim.ema else 0.0)
    live.to(dtype=dtype)  # as autocast computes
    base.to(dtype=dtype)
    denoiser = Denoiser(base, live, live.trains_text, whole=whole)
    width, height = (side // base.vae_scale_factor for side in work.size)
    channels = base.latents.channels

    def inputs(count: int) -> tuple[Tensor, Tensor, list[str], list[SizeConditioning]]:
        noisy = torch.empty(count, channels, height, width, device=base.device)
        times = torch.zeros(count, dtype=torch.long, device=base.device)
        size = work.size[1], work.size[0]
        frame = SizeConditioning(size, (0, 0), size, torch.empty(3, *size, device=base.device))
        return noisy, times, [work.prompts[number % len(work.prompts)] for number in range(count)], [frame] * count

    with FlopCounterMode(display=False) as forward, torch.no_grad(), _fused_attention():
        denoiser(*inputs(1))
    fixed = {value.untyped_storage()._cdata for value in denoiser.parameters()}
    recomputed = 0
    if work.checkpointing:
        with _fused_attention(), _saved_bytes(fixed) as saved, _growth(denoiser, base, saved) as grown:
            denoiser(*inputs(work.images))
        recomputed = max(grown)  # in the backward pass one checkpointed block at a time has its activations again
        for network in filter(None, (base.denoiser, live.trained_network)):
            network.enable_gradient_checkpointing()
            network.train()
    with _fused_attention(), FlopCounterMode(display=False) as both_passes, _saved_bytes(fixed) as saved:
        denoiser(*inputs(work.images)).square().mean().backward()
    live.detach()
    step = both_passes.get_total_flops() * work.accumulate
    training, activations = int(trained * bytes_per_parameter), saved.peak + recomputed
    return Cost(trained, stored, entries, weights, training, activations, step, forward.get_total_flops())


def decoding_flops(base: Base, size: tuple[int, int]) -> float:
    """FLOPs of decoding a picture of (width, height) pixels with gradients to its latents, on a base on ``meta``.

    With gradient checkpointing the decoder runs twice, and its backward pass, without gradients of weights, costs as
    much as a forward pass.
    """
    width, height = (side // base.vae_scale_factor for side in size)
    latents = torch.empty(1, base.latents.channels, height, width, device=base.device, dtype=base.vae.dtype)
    with FlopCounterMode(display=False) as decoding, torch.no_grad(), _fused_attention():
        base.family.decode(base, latents)
    return 3.0 * float(decoding.get_total_flops())


def denoiser_speed(base: Base, device: torch.device) -> float:
    """FLOPs a second that a block of the denoiser, with random weights, reaches on `device`."""
    block, shapes, width = base.family.block_for_timing(base)
    with quiet_libraries():
        block = copy.deepcopy(block).to_empty(device=device)
    for value in block.parameters():
        nn.init.normal_(value, std=0.02)
    side, dtype = base.family.native_size(base), base.denoiser.dtype
    inputs = {name: torch.randn(*shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    x = torch.randn(1, width, side, side, device=device, dtype=dtype)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counted:
            block(x, **inputs)
        seconds: list[float] = []
        while len(seconds) < 3 or (sum(seconds) < _TIMED and len(seconds) < _MOST_RUNS):
            start = time.perf_counter()
            block(x, **inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return float(counted.get_total_flops() / min(seconds))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within the block attention on the meta device is one fused operation, as on real devices.

    PyTorch decomposes it on ``meta`` into products with square matrices, which would inflate the memory estimate. Masks
    are left out, as they change neither memory nor time much. The patch works because diffusers looks up
    ``F.scaled_dot_product_attention`` at each call.
    """
    original = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if not query.is_meta or query.ndim != 4:
            return original(query, key, value, *args, **options)
        groups = query.shape[1] // key.shape[1]  # heads that share keys and values; real kernels do not repeat them
        pair = (one.repeat_interleave(groups, 1) if groups > 1 else one for one in (key, value))
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, *pair)[0]
        return out

    with patch.object(F, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def _growth(denoiser: Denoiser, base: Base, saved: "_SavedBytes") -> Iterator[list[int]]:
    """Yield a list that collects the bytes that each checkpointed block of the networks adds to `saved`."""
    grown: list[int] = []
    before: list[int] = []
    hooks = []
    for module in denoiser.modules():
        if type(module).__name__ in base.family.checkpointed:
            hooks.append(module.register_forward_pre_hook(lambda *_: before.append(saved.now)))
            hooks.append(module.register_forward_hook(lambda *_: grown.append(saved.now - before.pop())))
    try:
        yield grown
    finally:
        for hook in hooks:
            hook.remove()


class _SavedBytes:
    """Bytes that autograd saves for the backward pass, now and at their peak; each storage counts once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._references: dict[int, int] = {}

    def add(self, storage: Any) -> None:
        key = storage._cdata
        self._references[key] = self._references.get(key, 0) + 1
        if self._references[key] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, storage: Any) -> None:
        key = storage._cdata
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.now -= storage.nbytes()


class _SavedTensor:
    """A tensor that autograd saves; it counts in a `_SavedBytes` until autograd releases it."""

    def __init__(self, value: Tensor, saved: _SavedBytes) -> None:
        self.value, self._storage, self._saved = value, value.untyped_storage(), saved
        saved.add(self._storage)

    def __del__(self) -> None:
        self._saved.remove(self._storage)


@contextmanager
def _saved_bytes(fixed: set[int]) -> Iterator[_SavedBytes]:
    """Count the bytes that autograd saves within the block, except storages in `fixed`, which exist anyway."""
    saved = _SavedBytes()

    def pack(value: Tensor) -> Any:
        return value if value.untyped_storage()._cdata in fixed else _SavedTensor(value, saved)

    def unpack(packed: Any) -> Tensor:
        value: Tensor = packed.value if isinstance(packed, _SavedTensor) else packed
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved
