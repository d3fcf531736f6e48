"""Which family's transformer a file holds, told by the names of its tensors, in either layout."""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.original_weights import is_weight
from diffgraft.bases.registry import families

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.")
"""Prefixes that the names of all weights of a transformer may have"""


class NamedTransformer(NamedTuple):
    """What the names of a file's tensors tell."""

    prefix: str
    """Prefix of the names of the transformer's weights"""
    family: str | None
    """Its family; None if the names are those of no known one"""


@cache
def layouts() -> dict[str, OriginalLayout]:
    """Return the original layouts by family."""
    return {name: family.original for name, family in families().items() if family.original is not None}


def transformer_in(names: Collection[str]) -> NamedTransformer:
    """Find the family that has most of these names, if it has more than half of them."""
    prefix = _prefix(names)
    bundled = tuple(start for family in families().values() for starts in family.bundled.values() for start in starts)
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and not name.startswith(bundled)]
    counts = {family: sum(is_weight(layout, name) for name in own) for family, layout in layouts().items()}
    best = max(counts, key=lambda family: counts[family])
    return NamedTransformer(prefix, best if 2 * counts[best] > len(own) else None)


def is_transformer(names: Collection[str]) -> bool:
    """Whether these are the names of a whole transformer, and not those of an adapter with weights of some layers.

    All of its layers outside of blocks have to be among them, with a weight each; those of (IA)³ are none of layers.
    """
    prefix = _prefix(names)
    found = {name.removeprefix(prefix).removesuffix(".weight") for name in names if name.endswith(".weight")}
    if any(name.endswith(".on_input") for name in names):
        return False
    for layout in layouts().values():
        tables = (table.items() for (theirs, _), table in layout.blocks.items() if not theirs)
        if all(theirs in found or ours in found for table in tables for theirs, ours in table):
            return True
    return False


def _prefix(names: Collection[str]) -> str:
    return next((start for start in PREFIXES if any(name.startswith(start) for name in names)), "")
