"""Float8 tensors in files, which are converted to wider types on reading, without loss.

Float16 represents every value of ``float8_e4m3fn`` and ``float8_e5m2``. Some files divide each tensor by a scale first,
stored beside it as ``<layer>.scale_weight`` (ComfyUI, which marks such files with a tensor ``scaled_fp8``),
``<layer>.weight_scale`` or ``<key>_scale``; the products are float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_MARK = "scaled_fp8"
_INPUT_SCALES = (".scale_input", ".input_scale")
"""Endings of the scales of layer inputs, which do not concern weights"""


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert float8 tensors to float16, or multiply them with their scale into float32, and drop the scales.

    Raises:
        ValueError: a scale has more than one element.
    """
    scales = {_MARK, *(name for key in tensors for name in _scale_names(key))}
    float8_keys = [key for key, value in tensors.items() if value.dtype in DTYPES and key not in scales]
    result = dict(tensors)
    result.pop(_MARK, None)
    for key in float8_keys:
        layer = key.removesuffix(".weight")
        name = next((name for name in _scale_names(key) if name in result), None)
        result[key] = result[key].to(torch.float16)
        if name is not None:
            scale = result.pop(name)
            if scale.numel() != 1:
                raise ValueError(f"the scale {name} has shape {list(scale.shape)}; expected a single number")
            result[key] = result[key].float() * scale.float().reshape(())
        for ending in _INPUT_SCALES:
            result.pop(f"{layer}{ending}", None)
    return result


def _scale_names(key: str) -> tuple[str, ...]:
    """Names under which the scale of the tensor `key` may be stored."""
    layer = key.removesuffix(".weight")
    return f"{layer}.scale_weight", f"{layer}.weight_scale", f"{key}_scale"
