"""Tensors of GGUF files, in which blocks of weights share scales; they are dequantized to float32 when they are read.

Weights for ComfyUI have the names of the original layout there, without a prefix. Weights whose rows no block divides
are stored in another shape, and the file has theirs in ``comfy.gguf.orig_shape.NAME``.
Source: ggml-org/ggml, ``docs/gguf.md``; city96/ComfyUI-GGUF, ``loader.py``.
"""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgraft.bases.stored_tensors import StoredTensor
from diffgraft.errors import DiffgraftError, one_line

_SHAPE = "comfy.gguf.orig_shape."


def open_gguf(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF file by name.

    Raises:
        DiffgraftError: the package `gguf` is missing, the file is damaged, or has a quantization that is not known.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise DiffgraftError(
            f"{path} is a GGUF file, which needs the package gguf: install it with `pip install gguf`, or give the "
            "model in safetensors."
        ) from error
    try:
        reader = GGUFReader(path)
        shapes = {name: _stored_shape(field) for name, field in reader.fields.items() if name.startswith(_SHAPE)}
        tensors = {tensor.name: _stored(tensor, shapes.get(f"{_SHAPE}{tensor.name}")) for tensor in reader.tensors}
        for tensor in reader.tensors:  # an unknown quantization shows before anything is loaded
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except Exception as error:  # the reader raises many kinds of exceptions for damaged files
        if isinstance(error, NotImplementedError) or "GGMLQuantizationType" in str(error):
            raise DiffgraftError(
                f"{path} has weights in a quantization that is not supported ({one_line(error)}): give the model in "
                "another."
            ) from error
        raise DiffgraftError(f"{path} is not a readable GGUF file: {one_line(error)}. Download it again.") from error
    return tensors


def _stored_shape(field: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in field.contents())


def _stored(tensor: Any, shape: tuple[int, ...] | None) -> StoredTensor:
    """Return a tensor of the reader; its rows are those of `shape`, if the file has one for it."""
    from gguf.quants import dequantize

    own = tuple(int(side) for side in reversed(tensor.shape.tolist()))
    if shape is not None and prod(shape) != prod(own):
        raise ValueError(f"{tensor.name} has {prod(own)} numbers, and not the shape {[*shape]}")

    def rows(start: int, stop: int) -> Tensor:
        if shape is None and len(own) > 1:
            return torch.from_numpy(dequantize(tensor.data[start:stop], tensor.tensor_type).copy())
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape or own)[start:stop]

    return StoredTensor(own if shape is None else shape, tensor.tensor_type.name, rows)
