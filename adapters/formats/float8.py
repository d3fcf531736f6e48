"""Numbers of 8 bits in files: widened on reading, exactly, as nothing is computed in them.

Float16 holds every value of ``float8_e4m3fn`` and ``float8_e5m2``. Some files divide each tensor by a scale of its own
first, which stands beside it as ``<layer>.scale_weight`` (ComfyUI, which marks such files by a tensor ``scaled_fp8``),
``<layer>.weight_scale`` or ``<key>_scale``; the products are float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_MARK = "scaled_fp8"
_UNUSED = (".scale_input", ".input_scale")
"""Scales of what layers are given, which say nothing about weights."""


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with all of 8 bits as float16, or multiplied with their scales as float32; scales are left out.

    Raises:
        ValueError: a scale is no single number.
    """
    scales = {_MARK, *(name for key in tensors for name in _scales_of(key))}
    small = [key for key, value in tensors.items() if value.dtype in TYPES and key not in scales]
    found = dict(tensors)
    found.pop(_MARK, None)
    for key in small:
        layer = key.removesuffix(".weight")
        name = next((name for name in _scales_of(key) if name in found), None)
        found[key] = found[key].to(torch.float16)
        if name is not None:
            scale = found.pop(name)
            if scale.numel() != 1:
                raise ValueError(f"its scale {name} is {list(scale.shape)}, where one number was expected")
            found[key] = found[key].float() * scale.float().reshape(())
        for ending in _UNUSED:
            found.pop(f"{layer}{ending}", None)
    return found


def _scales_of(key: str) -> tuple[str, ...]:
    """Names under which the scale of the tensor `key` may stand."""
    layer = key.removesuffix(".weight")
    return f"{layer}.scale_weight", f"{layer}.weight_scale", f"{key}_scale"
