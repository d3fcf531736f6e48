"""Other ways to compute the same while a run lasts: attention, memory layout, compilation. Only rounding differs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

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
def sped_up(runtime: RuntimeSettings, denoiser: Denoiser) -> Iterator[None]:
    """Within the block the UNet computes as the recipe says; afterwards processors, strides and bits are as before.

    A compiled UNet stands in the denoiser alone; what else uses the base's, like the drawing of samples, uses it as it
    is. Hooks are compiled with it, and those that are added later are not seen.
    """
    unet = denoiser.unet
    processors = dict(unet.attn_processors)
    strides = {value: value.stride() for value in unet.parameters()} if runtime.channels_last else {}
    try:
        _set_attention(unet, runtime.attention)
        if runtime.channels_last:
            unet.to(memory_format=torch.channels_last)
        with _compiled(unet) if runtime.compile else nullcontext(unet) as denoiser.unet:
            yield
    finally:
        denoiser.unet = unet
        unet.set_attn_processor(processors)
        for value, stride in strides.items():
            value.data = value.new_empty_strided(value.shape, stride).copy_(value.data)


@contextmanager
def _compiled(unet: Any) -> Iterator[Any]:
    """A UNet compiled with the hooks that it has now; nothing of that is kept afterwards."""
    torch.compiler.reset()  # what was compiled of such a UNet before would be used again, whatever hooks it had
    try:
        with warnings.catch_warnings():
            # diffusers asks for PyTorch's version through a cache, which makes no difference
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            yield torch.compile(unet, backend=BACKEND)
    finally:
        torch.compiler.reset()


def _set_attention(unet: Any, kind: str) -> None:
    """Give the attentions of a UNet one of diffusers' processors.

    They are of the older kind, which its attention backends (`set_attention_backend`) do not reach.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if kind == "plain":
        unet.set_attn_processor(AttnProcessor())
    elif kind == "sliced":
        unet.set_attention_slice("max")  # "auto" halves the heads, and of one head makes none
    elif kind == "xformers":
        unet.enable_xformers_memory_efficient_attention()
