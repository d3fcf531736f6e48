"""Other ways to compute the same while a run lasts: attention, memory layout, compilation. Only rounding differs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.denoiser import Denoiser
from diffgraft.trainers.recipe.groups import RuntimeSettings

BACKEND = "inductor"
"""Of torch.compile; it needs a C++ compiler on processors"""


def check_speed(runtime: RuntimeSettings, device: torch.device) -> None:
    """Refuse what cannot run here.

    Raises:
        DiffgraftError: xformers is asked for, and the package or the GPU it needs is not there.
    """
    from diffusers.utils import is_xformers_available

    if runtime.attention != "xformers":
        return
    if not is_xformers_available():
        raise DiffgraftError(
            "attention=xformers needs the package xformers, which is not installed. Install it (pip install xformers), "
            "or leave attention at default, which needs as little memory."
        )
    if device.type != "cuda":
        raise DiffgraftError(
            f"attention=xformers runs on GPUs of NVIDIA, and this run is on {device.type}: leave attention at default."
        )


@contextmanager
def sped_up(runtime: RuntimeSettings, base: Base, denoiser: Denoiser) -> Iterator[None]:
    """Within the block the denoiser computes as the recipe says; afterwards processors, strides and bits are as before.

    A compiled network stands in `denoiser` alone; what else uses the base's, like the drawing of samples, uses it as it
    is. Hooks are compiled with it, and those that are added later are not seen.
    """
    network = denoiser.denoiser
    processors = None if runtime.attention == "default" else dict(network.attn_processors)
    strides = {value: value.stride() for value in network.parameters()} if runtime.channels_last else {}
    try:
        if processors is not None:
            base.family.set_attention(network, runtime.attention)
        if runtime.channels_last:
            network.to(memory_format=torch.channels_last)
        with _compiled(network) if runtime.compile else nullcontext(network) as denoiser.denoiser:
            yield
    finally:
        denoiser.denoiser = network
        if processors is not None:
            network.set_attn_processor(processors)
        for value, stride in strides.items():
            value.data = value.new_empty_strided(value.shape, stride).copy_(value.data)


@contextmanager
def _compiled(network: Any) -> Iterator[Any]:
    """A network compiled with the hooks that it has now; nothing of that is kept afterwards."""
    torch.compiler.reset()  # what was compiled of such a network before would be used again, whatever hooks it had
    try:
        with warnings.catch_warnings():
            # diffusers asks for PyTorch's version through a cache, which makes no difference
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            yield torch.compile(network, backend=BACKEND)
    finally:
        torch.compiler.reset()
