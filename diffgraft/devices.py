"""Devices and dtypes by name."""

import warnings
from typing import TYPE_CHECKING

from diffgraft.errors import DiffgraftError, did_you_mean

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "float16", "bfloat16")


def has_bfloat16() -> bool:
    """Return whether this processor computes in bfloat16; others emulate it, some twenty times slower than float32."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_slow_bfloat16(name: str, device: "torch.device") -> None:
    """Warn if precision `name` is bfloat16 and `device` is a processor that only emulates it."""
    if name == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        warnings.warn(
            "This processor has no bfloat16 instructions and emulates them slowly; precision=float32 is faster here.",
            stacklevel=3,
        )


def device_of(name: str = "") -> "torch.device":
    """Return the device called `name`, such as ``cuda``, ``cuda:1``, ``mps`` or ``cpu``.

    Empty stands for the accelerator, or for the CPU on machines without one.

    Raises:
        DiffgraftError: this machine has no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not name:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = f"cpu and {accelerator}" if accelerator else "only cpu"
        raise DiffgraftError(f"Invalid value device={name!r}: this machine has {available}.") from error
    if device.type == "meta":
        raise DiffgraftError("Invalid value device='meta': it holds no numbers, so nothing can be computed on it.")
    return device


def dtype_of(name: str, device: "torch.device") -> "torch.dtype":
    """Return the dtype called `name`; empty stands for float16 on a GPU and float32 on the CPU.

    Raises:
        DiffgraftError: `name` is not in `PRECISIONS`.
    """
    import torch

    if name and name not in PRECISIONS:
        raise DiffgraftError(f"Invalid value precision={name!r}: {did_you_mean(name, PRECISIONS)}")
    dtype: torch.dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "float16"))
    return dtype
