"""Shapes of a denoiser's weights under the names of diffusers: what they tell about its configuration."""

import re
from collections.abc import Mapping

from diffgraft.errors import DiffgraftError


class ShapeTable:
    """Name → shape of the weights that a file has, with the questions that configurations are made from."""

    def __init__(self, source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._source, self._shapes = source, shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def size(self, name: str, axis: int = 0) -> int:
        """Return the length of an axis of a weight.

        Raises:
            DiffgraftError: the file lacks the weight, or it has no such axis.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise DiffgraftError(f"{self._source} lacks {name}, which tells the size of its transformer.")
        if axis >= len(shape):
            raise DiffgraftError(f"{self._source} has {name} of shape {[*shape]}, which has too few axes.")
        return shape[axis]

    def count(self, blocks: str) -> int:
        """Return the number of blocks under the path `blocks`, counted by the largest index."""
        return 1 + max(self.indices(f"{blocks}.*."), default=-1)

    def indices(self, pattern: str) -> list[int]:
        """Return the numbers that ``*`` stands for in beginnings of names, sorted."""
        known = re.compile(re.escape(pattern).replace(r"\*", r"(\d{1,4})"))
        return sorted({int(match[1]) for name in self._shapes if (match := known.match(name))})
