"""Tensors of a checkpoint file, read by rows, whatever they are stored in: floats, scaled float8, or GGUF's blocks."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgraft.bases.checkpoint_files import DTYPES
from diffgraft.bases.gguf_files import open_gguf
from diffgraft.bases.scaled_weights import with_scales
from diffgraft.bases.stored_tensors import StoredTensor
from diffgraft.errors import DiffgraftError, one_line

_LONGEST_NAME = 250


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file, while it is open."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    """Name → tensor; scales of weights are not among them, as they are applied on reading"""
    header: Mapping[str, str] = field(default_factory=dict)
    """Entries of the header, where the file has one of texts"""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self) -> torch.dtype:
        """Return the dtype of most numbers; quantized ones count as bfloat16, which holds as much of them."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            dtype = DTYPES.get(tensor.kind, torch.bfloat16)
            counts[dtype] = counts.get(dtype, 0) + prod(tensor.shape)
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a ``.safetensors`` or ``.gguf`` file; its tensors can be read within the block.

    Raises:
        DiffgraftError: the file is damaged, of another kind, or quantized in a way that is not supported.
    """
    if path.suffix == ".gguf":
        found = open_gguf(path)
        _check_names(path, found)
        yield TensorFile(path, found)
        return
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DiffgraftError(f"{path} is not a readable .safetensors file: {one_line(error)}.") from error
    with opened as file:
        tensors = {name: _stored(file, name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        _check_names(path, tensors)
        header = file.metadata() or {}
        yield TensorFile(path, with_scales(path, tensors, header), header)


def _check_names(path: Path, names: Collection[str]) -> None:
    """Raise DiffgraftError if a tensor has a name that no message could show."""
    if any(len(name) > _LONGEST_NAME or not name.isprintable() for name in names):
        raise DiffgraftError(f"{path} has tensors whose names are not text of at most {_LONGEST_NAME} characters.")


def _stored(file: Any, name: str) -> StoredTensor:
    entry = file.get_slice(name)

    def rows(start: int, stop: int) -> Tensor:
        value: Tensor = file.get_slice(name)[start:stop] if entry.get_shape() else file.get_tensor(name)
        return value.clone()  # tensors of the library may be views of the file

    return StoredTensor(tuple(entry.get_shape()), entry.get_dtype(), rows)
