"""A tensor in a checkpoint file, before it is read."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class StoredTensor(NamedTuple):
    """A tensor in a file, which is read by rows, so that nothing larger than a weight is in memory twice."""

    shape: tuple[int, ...]
    """Its shape once read, whatever it is stored as"""
    kind: str
    """How its numbers are stored: name of a dtype in safetensors, or of a quantization in GGUF"""
    rows: Callable[[int, int], Tensor]
    """Function that reads the rows from the first number up to the second; quantized ones are returned in float32"""

    def read(self) -> Tensor:
        """Read the whole tensor from its file."""
        return self.rows(0, self.shape[0] if self.shape else 1)
