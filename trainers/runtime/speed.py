"""Faster ways to compute the denoiser during a run: attention kernels, channels-last layout, compilation.

Results differ by rounding only.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from diffgraft.bases import Base
from diffgraft.devices import warn_of_slow_bfloat16
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.groups import RuntimeSettings

BACKEND = "inductor"
"""Backend of torch.compile; on CPUs it needs a C++ compiler"""


def check_speed(runtime: RuntimeSettings, device: torch.device) -> None:
    """Check that the recipe's attention can run on this machine; warn if its precision is slow on it.

    Raises:
        DiffgraftError: `attention=xformers` is set, but the package or an NVIDIA GPU is missing; or the denoiser would
            be compiled in bfloat16 on a CPU.
    """
    warn_of_slow_bfloat16(runtime.precision, device)
    if runtime.compile and runtime.precision == "bfloat16" and device.type == "cpu":
        # found with PyTorch 2.13: most gradients of a small UNet came out as 0, without an error; float32 is right
        raise DiffgraftError(
            "On CPUs, PyTorch's compiler computes wrong gradients in bfloat16: set compile=false or precision=float32."
        )
    if runtime.attention != "xformers":
        return
    from diffusers.utils import is_xformers_available

    if not is_xformers_available():
        raise DiffgraftError(
            "attention=xformers needs the package xformers, which is not installed. Install it (pip install xformers), "
            "or use attention=default, which needs as little memory."
        )
    if device.type != "cuda":
        raise DiffgraftError(
            f"attention=xformers needs an NVIDIA GPU, but this run is on {device.type}: use attention=default."
        )


@contextmanager
def sped_up(runtime: RuntimeSettings, base: Base, denoiser: Denoiser) -> Iterator[None]:
    """Within the block the denoiser uses the recipe's attention, memory layout and compilation; afterwards its own.

    Only `denoiser` refers to the compiled network: samples are generated with the base's uncompiled one. Forward hooks
    are compiled along with the network, and those added later are ignored.
    """
    network = denoiser.denoiser
    set_back: Callable[[], None] | None = None
    strides = {value: value.stride() for value in network.parameters()} if runtime.channels_last else {}
    try:
        if runtime.attention != "default":
            set_back = base.family.set_attention(network, runtime.attention)
        if runtime.channels_last:
            network.to(memory_format=torch.channels_last)
        with _compiled(network) if runtime.compile else nullcontext(network) as denoiser.denoiser:
            yield
    finally:
        denoiser.denoiser = network
        if set_back is not None:
            set_back()
        for value, stride in strides.items():
            value.data = value.new_empty_strided(value.shape, stride).copy_(value.data)


@contextmanager
def _compiled(network: Any) -> Iterator[Any]:
    """Yield a network compiled with its current forward hooks; afterwards the compiler's cache is cleared."""
    torch.compiler.reset()  # cached code of the same network would be reused even if its hooks differ
    try:
        with warnings.catch_warnings():
            # diffusers reads PyTorch's version through a cache, which is harmless
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            yield torch.compile(network, backend=BACKEND)
    finally:
        torch.compiler.reset()
