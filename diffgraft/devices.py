"""Which device computes, and in which precision."""

from typing import TYPE_CHECKING

from diffgraft.errors import DiffgraftError, did_you_mean

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "float16", "bfloat16")


def device_of(name: str = "") -> "torch.device":
    """The device called `name` (``cuda``, ``cuda:1``, ``mps``, ``cpu`` …); empty: the accelerator where there is one.

    Raises:
        DiffgraftError: there is no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not name:
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = f"cpu and {accelerator}" if accelerator else "only cpu"
        raise DiffgraftError(f"Invalid value device={name!r}: this machine has {here}.") from error
    if found.type == "meta":
        raise DiffgraftError("The device 'meta' holds no numbers, so that nothing can be computed there.")
    return found


def dtype_of(name: str, device: "torch.device") -> "torch.dtype":
    """The precision called `name`; empty: float16 on a GPU, float32 on a processor.

    Raises:
        DiffgraftError: there is no such precision.
    """
    import torch

    if name and name not in PRECISIONS:
        raise DiffgraftError(f"There is no precision {name!r}: {did_you_mean(name, PRECISIONS)}")
    found: torch.dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "float16"))
    return found
