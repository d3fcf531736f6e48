"""Estimate of a training step's cost on a base without weights: trainable parameters, memory, FLOPs."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffgraft.adapters.method import Attached
from diffgraft.bases import Base, SizeConditioning
from diffgraft.bases.quantized import Quantize, bytes_when_quantized
from diffgraft.third_party import quiet_libraries
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.planning.live_bytes import LiveBytes
from diffgraft.trainers.recipe.groups import ModelSettings, OptimSettings
from diffgraft.trainers.runtime.block_swap import check_swap_frozen, swapped_bytes
from diffgraft.trainers.runtime.offload import offloadable

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
    """Bytes of the frozen networks that stay in memory during training, and of the slots of swapped blocks"""
    waiting: int
    """Bytes of the swapped blocks in main memory"""
    training: int
    """Bytes of the trainable parameters with their gradients, optimizer state and EMA"""
    activations: int
    """Bytes of everything that a step computes, beside gradients of parameters, at its peak"""
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
    block_swap: int = 0
    """Number of the denoiser's blocks that wait in main memory"""
    has_texts: bool = True
    """Whether all text embeddings are cached, so that text encoders are not needed"""


def estimate_cost(
    base: Base,
    attach: Callable[[], Attached],
    work: Workload,
    model: ModelSettings,
    optim: OptimSettings,
    *,
    whole: bool,
) -> Cost:
    """Estimate the cost of training.

    Args:
        base: a base on the meta device.
        attach: attaches the method to `base`.
        work: the inputs of a step.
        model: the recipe's settings of the base.
        optim: the recipe's optimizer settings.
        whole: whether long prompts are encoded in chunks.

    Raises:
        DiffgraftError: blocks are swapped, but the method trains the denoiser's own weights.
    """
    sizes = {
        name: bytes_when_quantized(part, model.quantize if name != "vae" else "none") for name, part in base.parts()
    }
    dtype, live = base.denoiser.dtype, attach()
    check_swap_frozen(work.block_swap, base, live)
    trainable = {name: value for name, value in live.trainable().items() if value.requires_grad}
    trained = sum(value.numel() for value in trainable.values())
    stored = trained + sum(buffer.numel() for buffer in live.buffers())
    entries = len(trainable) + len({name.rpartition(".")[0] for name in trainable} - {""})
    has_texts = work.has_texts and not live.affects_text_encoder
    waiting, slots = swapped_bytes(base, work.block_swap, model.quantize)
    weights = sum(sizes[name] for name in sizes.keys() - offloadable(base, has_texts=has_texts)) - waiting + slots
    bytes_per_parameter = 4.0 + 4.0 + STATE_BYTES[optim.optimizer] + (4.0 if optim.ema else 0.0)
    casts = trained * dtype.itemsize if dtype.itemsize < 4 else 0  # of autocast, which keeps them until the update
    casts += _dequantized(base, model.quantize)
    live.to(dtype=dtype)  # as autocast computes
    base.to(dtype=dtype)
    denoiser = Denoiser(base, live, live.trains_text, whole=whole)
    width, height = (side // base.vae_scale_factor for side in work.size)
    channels = base.latents.channels

    def inputs(count: int) -> tuple[Tensor, Tensor, list[str], list[SizeConditioning]]:
        noisy = torch.empty(count, channels, height, width, device=base.device)
        times = torch.zeros(count, dtype=torch.long, device=base.device)
        size = work.size[1], work.size[0]
        condition = None if live.control is None else torch.empty(3, *size, device=base.device)
        frame = SizeConditioning(size, (0, 0), size, condition)
        return noisy, times, [work.prompts[number % len(work.prompts)] for number in range(count)], [frame] * count

    with FlopCounterMode(display=False) as forward, torch.no_grad(), _fused_attention():
        denoiser(*inputs(1))
    if work.checkpointing:
        for network in filter(None, (base.denoiser, live.trained_network)):
            network.enable_gradient_checkpointing(partial(_checkpointed, dtype))
            network.train()

    def step() -> None:
        given = inputs(work.images)
        _latents, _noise, target = (torch.empty_like(given[0]) for _ in range(3))
        (denoiser(*given) - target).square().mean().backward()

    with _fused_attention(), _autocast(dtype):
        with LiveBytes() as held:
            for _ in range(min(work.accumulate, 2)):  # from the second micro-batch on all gradients are there
                step()
        gradients = sum(0 if value.grad is None else value.grad.nbytes for value in trainable.values())
        with FlopCounterMode(display=False) as both_passes:  # apart, as it holds on to tensors
            step()
    live.detach()
    flops = both_passes.get_total_flops() * work.accumulate
    training, activations = int(trained * bytes_per_parameter), held.peak - gradients + casts
    return Cost(trained, stored, entries, weights, waiting, training, activations, flops, forward.get_total_flops())


def _dequantized(base: Base, quantize: Quantize) -> int:
    """Return the bytes of the largest weight of a block while it is dequantized; int8 is scaled in float32."""
    if quantize == "none":
        return 0
    blocks = (module for module in base.denoiser.modules() if type(module).__name__ in base.family.checkpointed)
    layers = (layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear)
    largest = max((layer.weight.numel() for layer in layers), default=0)
    return int(largest * (base.denoiser.dtype.itemsize + (4 if quantize == "int8" else 0)))


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


def _checkpointed(dtype: torch.dtype, block: nn.Module, *args: Any) -> Any:
    """Run a block of a network with gradient checkpointing, whose second pass is under autocast as well."""
    contexts = nullcontext(), _autocast(dtype)
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return _Autocast(dtype) if dtype.itemsize < 4 else nullcontext()


class _Autocast(TorchFunctionMode):
    """Casts inputs of layers to half precision, and those of norms to float32, as autocast does on GPUs.

    Autocast itself does nothing on the device ``meta``. Source: "CUDA Ops that can autocast" in PyTorch's documentation
    of `torch.amp`, of which these are the operations that denoisers have.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        half = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm)
        norms = (F.layer_norm, F.group_norm, F.rms_norm, F.softmax)
        methods = (Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
        self._casts = dict.fromkeys((*half, *methods), dtype) | dict.fromkeys(norms, torch.float32)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        to, given = self._casts.get(func), (args, kwargs or {})
        if to is not None:
            given = tree_map_only(Tensor, lambda value: value.to(to) if value.is_floating_point() else value, given)
        return func(*given[0], **given[1])
