"""Registry of families, and the names of their networks."""

from collections.abc import Callable
from functools import cache

from torch import Tensor, nn

from diffgraft.bases.family import GROUP, Family
from diffgraft.plugins import discover


@cache
def families() -> dict[str, Family]:
    """Return all families by name: those of `diffgraft.bases.families`, and those of outside packages."""
    return discover(Family, "diffgraft.bases.families", "FAMILY", GROUP)  # type: ignore[type-abstract]


def denoisers() -> tuple[str, ...]:
    """Return the names of denoisers in pipelines, adapter paths and strengths."""
    return tuple(dict.fromkeys(family.denoiser for family in families().values()))


def schedule_timesteps(denoiser: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the `Family.schedule_timesteps` of a denoiser, found by its class; the identity for unknown classes."""
    kind = type(denoiser).__name__
    owners = (family for family in families().values() if kind in _classes(family))
    family = next(owners, None)
    return family.schedule_timesteps if family is not None else lambda inputs: inputs


def denoiser_name(module: nn.Module) -> str:
    """Return the name of a denoiser in pipelines, by its class.

    A class that no family names is that of an outside family that names none, or a UNet.
    """
    kind = type(module).__name__
    named = (family.denoiser for family in families().values() if kind in _classes(family))
    unnamed = (family.denoiser for family in families().values() if not _classes(family))
    return next(named, None) or next(unnamed, "unet")


def _classes(family: Family) -> tuple[str, ...]:
    """Return the class names of a family's denoisers."""
    component = family.components.get(family.denoiser)
    return () if component is None else component.classes


def tokenizers() -> dict[str, str]:
    """Return text encoder → its tokenizer, for all families."""
    slots = (slot for family in families().values() for slot in family.text)
    return dict(sorted({slot.component: slot.tokenizer for slot in slots}.items()))


def conditioner_tokenizers() -> dict[str, str]:
    """Return frozen network between text encoders and denoiser → its tokenizer, for all families."""
    slots = (slot for family in families().values() for slot in family.conditioners)
    return {slot.component: slot.tokenizer for slot in slots}


def part_names() -> tuple[str, ...]:
    """Return the names of the networks that adapters change: denoisers first, then text encoders in order."""
    return (*denoisers(), *tokenizers())


def layer_name_suffixes(part: str, group: str) -> tuple[str, ...]:
    """Return the endings of the paths of a group's layers inside the network `part`, over all families."""
    groups = (family.layers.get(part, {}).get(group, ()) for family in families().values())
    return tuple(dict.fromkeys(ending for endings in groups for ending in endings))


def has_blocks(part: str) -> bool:
    """Whether `part` is a denoiser with the block names IN00 … OUT11."""
    return any(family.blocks and family.denoiser == part for family in families().values())
