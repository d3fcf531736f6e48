"""Weights in float8 with scales, as ComfyUI writes them: a weight is its numbers times the scale of its layer.

Two generations of such files exist. Both have ``X.weight`` in float8. The scale is ``X.scale_weight`` beside a marker
``scaled_fp8``, or ``X.weight_scale`` beside ``X.comfy_quant`` or an entry of the header, which name the format. A scale
of inputs (``X.scale_input``, ``X.input_scale``) is for products in float8, and changes no weight.
Source: ComfyUI, ``comfy/ops.py``, ``comfy/quant_ops.py`` and ``convert_old_quants`` in ``comfy/utils.py``.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.bases.configs import short
from diffgraft.bases.stored_tensors import StoredTensor
from diffgraft.errors import DiffgraftError

_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_FORMAT, _MARKER = ".comfy_quant", "scaled_fp8"
_HEADER = "_quantization_metadata"
"""Entry of the header with the format of each layer, as JSON"""
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""Format of a layer → dtype of its weight in safetensors"""
_MAX_FORMAT = 2**12
"""Bytes of a layer's format at most"""
_MAX_HEADER = 2**22
"""Characters of the header's entry at most"""


def with_scales(path: Path, tensors: Mapping[str, StoredTensor], header: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Return the tensors of a file without its scales and markers; scaled weights are read multiplied, in float32.

    Args:
        path: the file, for messages.
        tensors: all tensors of the file by name.
        header: entries of its header.

    Raises:
        DiffgraftError: a scale is missing, damaged or of another shape, or a layer has a format that is no float8.
    """
    layers = {name.removesuffix(end): name for end in _SCALES for name in tensors if name.endswith(end)}
    for layer, form in _formats(path, tensors, header):
        if not isinstance(form, str) or form not in _FORMATS:
            raise DiffgraftError(
                f"{path} has {layer} in the format {short(form)}; of quantized weights only {' and '.join(_FORMATS)} "
                "are read: take the file in bfloat16, float16 or float8."
            )
        # a header may name layers without the prefix that their tensors have
        if layer not in layers and not any(own.endswith(f".{layer}") for own in layers):
            raise DiffgraftError(
                f"{path} has {layer}.weight in {form}, but no {layer}.weight_scale: download it again."
            )
    for prefix in (name.removesuffix(_MARKER) for name in tensors if _is_marker(name)):
        for name, tensor in tensors.items():
            is_scaled = name.startswith(prefix) and len(tensor.shape) == 2 and tensor.kind in _FORMATS.values()
            if is_scaled and name.removesuffix(".weight") not in layers:
                scale = f"{name.removesuffix('.weight')}.scale_weight"
                raise DiffgraftError(f"{path} has {name} in scaled float8, but no {scale}: download it again.")
    apart = {*layers.values(), *(name for name in tensors if name.endswith((*_INPUT_SCALES, _FORMAT)))}
    plain = {name: tensor for name, tensor in tensors.items() if name not in apart and not _is_marker(name)}
    return plain | {f"{layer}.weight": _scaled(path, tensors, layer, scale) for layer, scale in layers.items()}


def _is_marker(name: str) -> bool:
    return name == _MARKER or name.endswith(f".{_MARKER}")


def _formats(
    path: Path, tensors: Mapping[str, StoredTensor], header: Mapping[str, str]
) -> Iterator[tuple[str, object]]:
    """Yield path and format of each layer that a file says is quantized."""
    for name, tensor in tensors.items():
        if name.endswith(_FORMAT):
            if tensor.kind != "U8" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_FORMAT:
                raise DiffgraftError(f"{path} has {name}, which is not the format of a layer: download it again.")
            content = _json_object(path, name, bytes(tensor.read().tolist()))
            yield name.removesuffix(_FORMAT), content.get("format")
    text = header.get(_HEADER, "")
    layers = _json_object(path, _HEADER, text.encode()).get("layers") if text else {}
    if len(text) > _MAX_HEADER or not isinstance(layers, dict):
        raise DiffgraftError(f"The header of {path} has a damaged {_HEADER}: download the file again.")
    for layer, content in layers.items():
        yield layer, content.get("format") if isinstance(content, dict) else content


def _json_object(path: Path, name: str, content: bytes) -> dict[str, object]:
    try:
        found = json.loads(content[:_MAX_HEADER])
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise DiffgraftError(f"{path} has a damaged {name}, which is not JSON: download the file again.") from error
    return found


def _scaled(path: Path, tensors: Mapping[str, StoredTensor], layer: str, scale_name: str) -> StoredTensor:
    """Return the weight of a layer, which is multiplied by its scale when it is read."""
    scale, weight = tensors[scale_name], tensors.get(f"{layer}.weight")
    if weight is None or weight.kind not in _FORMATS.values():
        kind = "is missing" if weight is None else f"is {weight.kind}"
        raise DiffgraftError(
            f"{path} has {scale_name}, but {layer}.weight {kind}; only weights in float8 have scales that are read."
        )
    rows = weight.shape[0] if weight.shape else 1
    of_rows = (rows, *(1 for _ in weight.shape[1:]))
    if scale.shape not in ((), (1,), (1, 1), of_rows) or not weight.shape:
        raise DiffgraftError(
            f"{path} has {scale_name} of shape {[*scale.shape]}; a scale is one number, or {[*of_rows]} for the rows "
            f"of {layer}.weight."
        )
    factor = scale.read().float()
    if not factor.isfinite().all():
        raise DiffgraftError(f"{path} has {scale_name} that is not finite: download it again.")
    has_rows = scale.shape == of_rows and factor.numel() > 1
    factor = factor if has_rows else factor.reshape(())

    def read(start: int, stop: int) -> Tensor:
        values: Tensor = weight.rows(start, stop).to(torch.float32)
        return values * (factor[start:stop] if has_rows else factor)

    return StoredTensor(weight.shape, weight.kind, read)
