"""Families by name, and the names of networks that they have."""

from functools import cache

from diffgraft.bases.family import GROUP, Family
from diffgraft.plugins import discover


@cache
def families() -> dict[str, Family]:
    """Every family by name: one of each module of `diffgraft.bases.families`, and those of outside packages."""
    return discover(Family, "diffgraft.bases.families", "FAMILY", GROUP)  # type: ignore[type-abstract]


def denoisers() -> tuple[str, ...]:
    """Names that denoisers have in pipelines, adapter paths and strengths."""
    return tuple(dict.fromkeys(family.denoiser for family in families().values()))


def tokenizers() -> dict[str, str]:
    """Text encoder → its tokenizer."""
    slots = (slot for family in families().values() for slot in family.text)
    return dict(sorted({slot.component: slot.tokenizer for slot in slots}.items()))


def part_names() -> tuple[str, ...]:
    """The networks that adapters change: denoisers first, then text encoders in order."""
    return (*denoisers(), *tokenizers())


def layer_endings(part: str, group: str) -> tuple[str, ...]:
    """What the paths of a group's layers end in, inside the network `part`, in all families that have it."""
    found = (family.layers.get(part, {}).get(group, ()) for family in families().values())
    return tuple(dict.fromkeys(ending for endings in found for ending in endings))


def has_blocks(part: str) -> bool:
    """Whether `part` is a denoiser with the block names IN00 … OUT11."""
    return any(family.blocks and family.denoiser == part for family in families().values())
