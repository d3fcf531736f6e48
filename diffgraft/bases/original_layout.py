"""Names of a transformer's layers in its authors' code, which checkpoints and many adapter files have.

Diffusers renames these layers and splits the fused ones: the authors' ``img_attn.qkv`` is ``attn.to_q``, ``attn.to_k``
and ``attn.to_v`` there, one below the other. A family has one table of both names, in its own file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

_NUMBER = re.compile(r"\d+")


class OriginalLayer(NamedTuple):
    """A layer of the original layout, and the layers of diffusers that its outputs belong to.

    In tables, ``*`` in a path stands for the number of a block; it is the same in both layouts.
    """

    path: str
    """Path in the original layout"""
    layers: tuple[str, ...]
    """Paths in diffusers, in the order of the original layer's rows"""
    shares: tuple[int, ...] = (1,)
    """Rows of each of `layers`, in proportion to one another"""
    swapped: bool = False
    """Whether shift and scale are the other way around in diffusers, if the layer has only those: 2 · in rows"""
    shape: tuple[int, int] | None = None
    """Rows and columns in proportion to one another, where they tell what a layer is; None: not needed"""
    weight: str = "weight"
    """Name of its weight in the original layout"""

    def bounds(self, rows: int) -> list[tuple[int, int]]:
        """Return the first row of each of `layers` in the original layer, and the row after its last.

        Raises:
            ValueError: `rows`, the number of the original layer's rows, is not a multiple of the sum of `shares`.
        """
        unit, rest = divmod(rows, sum(self.shares))
        if rest:
            raise ValueError(f"{self.path} has {rows} rows, which are not divisible by {sum(self.shares)}")
        return list(pairwise(unit * share for share in accumulate(self.shares, initial=0)))

    def has_shape(self, rows: int, columns: int) -> bool:
        """Whether a weight [rows, columns] has the proportions of this layer, as far as they are known."""
        return self.shape is None or rows * self.shape[1] == columns * self.shape[0]


class NamedLayer(NamedTuple):
    """The layer of diffusers, or the whole original layer, that a module's name in a file refers to."""

    layer: OriginalLayer
    part: int | None
    """Index into ``layer.layers`` of the single layer of diffusers that is meant; None: the whole original layer"""


class Parameter(NamedTuple):
    """A parameter that is no layer's weight or bias."""

    original: str
    """Name in the original layout"""
    name: str
    """Name in diffusers"""
    is_flat: bool
    """Whether it has one axis in the original layout, and two in diffusers"""


@dataclass(frozen=True)
class OriginalLayout:
    """The table of a family: every module of its denoiser that has a weight, in both layouts."""

    blocks: Mapping[tuple[str, str], Mapping[str, str | tuple[str, ...]]]
    """Beginnings of paths in both layouts, original and diffusers → the rest of the original path → the rest of the
    path in diffusers, or of the paths that a fused layer is split into"""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Original path of a fused layer → `OriginalLayer.shares`, if its parts have different numbers of rows"""
    swapped: frozenset[str] = frozenset()
    """Original paths of layers with `OriginalLayer.swapped`"""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Original path → `OriginalLayer.shape`"""
    sizes: frozenset[tuple[int, int]] = frozenset()
    """Width of each published base, and number of its blocks of the first kind: they tell what a file is for that has
    only layers that several families have"""
    scales: frozenset[str] = frozenset()
    """Original paths of norms whose weight is named ``scale`` there"""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Original name → name in diffusers of parameters that are no layer's weight or bias, with ``*`` as in paths"""
    flat: frozenset[str] = frozenset()
    """Original names of those `parameters` that have one axis there and two in diffusers"""
    unused: frozenset[str] = frozenset()
    """Original names, with ``*`` for any text, of tensors that the denoiser of diffusers does not have, as they change
    nothing"""

    @cached_property
    def layers(self) -> list[OriginalLayer]:
        """All original layers, with ``*`` for the number of a block."""
        return [
            self._layer(f"{theirs}{rest}", [f"{ours}{name}" for name in ([names] if isinstance(names, str) else names)])
            for (theirs, ours), table in self.blocks.items()
            for rest, names in table.items()
        ]

    def _layer(self, path: str, layers: list[str]) -> OriginalLayer:
        shares = self.shares.get(path, (1,) * len(layers))
        weight = "scale" if path in self.scales else "weight"
        return OriginalLayer(path, tuple(layers), shares, path in self.swapped, self.shapes.get(path), weight)

    @cached_property
    def _named(self) -> dict[str, list[tuple[re.Pattern[str], NamedLayer]]]:
        """Every name, without its numbers → pattern of the name, and what it stands for."""
        named: dict[str, list[tuple[re.Pattern[str], NamedLayer]]] = {}
        for layer in self.layers:
            names = [(layer.path, None), *((path, part) for part, path in enumerate(layer.layers))]
            if len(layer.layers) > 1:
                names += [(f"{layer.path}.{part}", part) for part in range(len(layer.layers))]
            for name, part in names:
                pattern = re.escape(name).replace(r"\*", r"(\d+)").replace(r"\.", "[._]")
                named.setdefault(_without_numbers(name), []).append((re.compile(pattern), NamedLayer(layer, part)))
        return named

    def find(self, name: str) -> NamedLayer | None:
        """Find the layer that a name in a file stands for; None if this layout has no such layer.

        Args:
            name: path in the original layout or in diffusers, with dots or with underscores for them; or the original
                path of a fused layer and the number of one of its parts, as in ``img_attn.qkv.0``.
        """
        for pattern, (layer, part) in self._named.get(_without_numbers(name), ()):
            if match := pattern.fullmatch(name):
                number = match[1] if match.groups() else ""
                path, *layers = (path.replace("*", number) for path in (layer.path, *layer.layers))
                return NamedLayer(layer._replace(path=path, layers=tuple(layers)), part)
        return None

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of this original name changes nothing."""
        return any(fnmatchcase(name, pattern) for pattern in self.unused)

    def find_parameter(self, name: str) -> Parameter | None:
        """Find the parameter that is no layer's weight or bias and has this name in one of both layouts."""
        for theirs, ours in self.parameters.items():
            for known in (theirs, ours):
                if match := re.fullmatch(re.escape(known).replace(r"\*", r"(\d+)"), name):
                    number = match[1] if match.groups() else ""
                    return Parameter(theirs.replace("*", number), ours.replace("*", number), theirs in self.flat)
        return None


def _without_numbers(name: str) -> str:
    """Return a name with ``*`` for each number, and underscores for dots."""
    return _NUMBER.sub("*", name.replace(".", "_"))
