"""What an adapter is for: the family of its base, and how many layers the UNet has in a block.

It stands in the metadata under ``base``, from a header or from the base itself; else names and shapes tell. Every
writer and operation asks here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.dora import with_strength_convention
from diffgraft.adapters.ops.effect import fitting
from diffgraft.adapters.projections import laid_out
from diffgraft.adapters.registry import read_delta
from diffgraft.bases.ldm_keys import MAX_LEVELS, BlockLayout
from diffgraft.bases.shapes import FAMILY
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError

Deltas = Mapping[str, tuple[Delta, ...]]
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of what the cross-attentions look at → family."""
_OF_CONTEXT = (".attn2.to_k", ".attn2.to_v")
_LINEAR = {"sd1": False, "sd2": True, "sdxl": True}
"""Family → whether the projections around its attentions are linear layers in diffusers, or 1 × 1 convolutions."""
_DEEP = re.compile(r"\.transformer_blocks\.(?!0\.)\d+\.")
_NUMBERED = re.compile(r"unet\.(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?:resnets|attentions)\.(?P<number>\d+)\.")
_COUNTS = (2, 1, 3, 4)
"""Layers in a block that UNets may have, the usual first"""


def family_of(adapter: Adapter) -> str | None:
    """The family of the base that it is for: as the metadata says, else as names and shapes tell; None if they do not.

    The known bases may be laid out for that, which takes seconds once.
    """
    return _said(adapter, "family") or _by_names(adapter.deltas) or _by_shapes(adapter.deltas)


def with_family(adapter: Adapter) -> Adapter:
    """The adapter with its family in the metadata, as far as names and widths tell at a glance."""
    family = None if _said(adapter, "family") else _by_names(adapter.deltas)
    return with_base(adapter, family=family) if family else adapter


def with_known_family(adapter: Adapter) -> Adapter:
    """The adapter with its family in the metadata, where there is any way to know it: `family_of`."""
    if _said(adapter, "family"):
        return adapter
    family = family_of(adapter)
    return with_base(adapter, family=family) if family else adapter


def with_base(adapter: Adapter, **more: Any) -> Adapter:
    """The adapter with `more` in what its metadata says of the base."""
    said = adapter.metadata.get("base")
    base = {**(said if isinstance(said, Mapping) else {}), **more}
    return replace(adapter, metadata={**adapter.metadata, "base": base})


def common_base(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The family, and the layers in a block, that all `adapters` are for, as far as they say it and agree.

    Raises:
        DiffgraftError: they say different numbers of layers, so that no one base takes all of them.
        ValueError: what one of them says is no number of layers.
    """
    families = {family_of(adapter) for adapter in adapters}
    layers = {said for adapter in adapters if (said := _said_layers(adapter)) is not None}
    if len(layers) > 1:
        raise DiffgraftError(
            f"The adapters are for UNets with {' and '.join(map(str, sorted(layers)))} layers in a block; "
            "combine those that are for the same base."
        )
    family = families.pop() if len(families) == 1 else None
    return {
        **({"family": family} if family else {}),
        **({"layers_per_block": layers.pop()} if layers else {}),
    }


def _said(adapter: Adapter, key: str) -> Any:
    said = adapter.metadata.get("base")
    return said.get(key) if isinstance(said, Mapping) else None


def _by_names(deltas: Deltas) -> str | None:
    if not may_be_xl(deltas):
        widths = _widths(deltas) & {"sd1", "sd2"}
        return widths.pop() if len(widths) == 1 else None
    for path in deltas:
        if path.startswith(("text_encoder_2.", "unet.add_embedding.")) or _DEEP.search(path):
            return "sdxl"
    widths = _widths(deltas)
    return widths.pop() if len(widths) == 1 else None


def _widths(deltas: Deltas) -> set[str]:
    """Families that the widths of the cross-attentions are of."""
    found = set()
    for path, own in deltas.items():
        if path.startswith("unet.") and path.endswith(_OF_CONTEXT):
            shape = next((shape for delta in own if (shape := delta.weight_shape)), None)
            if shape is not None and len(shape) > 1 and shape[1] in _WIDTHS:
                found.add(_WIDTHS[shape[1]])
    return found


def made_for(adapter: Adapter, weights: Weights) -> Adapter:
    """The adapter with the family of a base in its metadata, and the layers in a block where there are not two."""
    family, layers = family_of_weights(weights), weights.layers_in_block
    said = {
        **({"family": family} if family else {}),
        **({"layers_per_block": layers} if layers not in (None, 2) else {}),
    }
    return with_base(adapter, **said) if said else adapter


def family_of_weights(weights: Weights) -> str | None:
    """The family of a base, by the width of what its cross-attentions look at, or its second text encoder."""
    shapes = weights.shapes()
    if any(path.startswith(("text_encoder_2.", "unet.add_embedding.")) for path in shapes):
        return "sdxl"
    widths = {_WIDTHS.get(shape[1]) for path, shape in shapes.items() if path.endswith(_OF_CONTEXT)}
    return widths.pop() if len(widths) == 1 else None


def _by_shapes(deltas: Deltas) -> str | None:
    families = {FAMILY[name] for name in fitting(deltas)} if deltas else set()
    return families.pop() if len(families) == 1 else None


def may_be_xl(deltas: Deltas) -> bool:
    """Whether no module lies where Stable Diffusion XL has none: it has three levels, and none on top attends."""
    return not any(
        path.startswith(("unet.down_blocks.0.attentions.", "unet.up_blocks.2.attentions.", "unet.down_blocks.3."))
        or path.startswith("unet.up_blocks.3.")
        for path in deltas
    )


def read_names(theirs: Mapping[str, Sequence[Delta]], layers: int | None = None) -> tuple[dict[str, str], int]:
    """Names of the original UNet → diffusers', and how many layers of a block they are counted by.

    The original numbers through all blocks, so that its names alone do not always tell: then the known base does whose
    layers they fit, or that only one reading leaves out no layer between two others.

    Args:
        theirs: name of a module → what is done to it.
        layers: layers in a block, where that is known.

    Raises:
        ValueError: no UNet has such names, or several may be meant.
    """
    readings: dict[int, dict[str, str]] = {}
    reason = ""
    for count in _COUNTS if layers is None else (layers,):
        blocks = BlockLayout(count, (True,) * MAX_LEVELS)
        try:
            readings[count] = {name: blocks.to_diffusers(name) for name in theirs}
        except ValueError as error:
            reason = reason or str(error)
    if not readings:
        raise ValueError(reason if layers is None else f"{reason} with {layers} layers in a block, which this base has")
    first = next(iter(readings.values()))
    if all(names == first for names in readings.values()):
        return first, 2 if 2 in readings else next(iter(readings))
    for count, names in readings.items():
        if fitting({f"unet.{names[name]}": tuple(own) for name, own in theirs.items()}):
            return names, count
    gapless = [count for count, names in readings.items() if not _has_gaps(names.values())]
    if len(gapless) == 1:
        return readings[gapless[0]], gapless[0]
    counts = " or ".join(map(str, sorted(readings)))
    raise ValueError(
        f"the numbers in its names count layers through all blocks, and may be those of a UNet with {counts} layers in "
        "a block: apply it to the base it is for, which tells"
    )


def _has_gaps(paths: Iterable[str]) -> bool:
    """Whether there is a layer in a level without the one before it, as no tool leaves it that adapts all of a kind."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if found := _NUMBERED.match(f"unet.{path}."):
            numbers.setdefault((found["side"], found["level"]), set()).add(int(found["number"]))
    return any(of_level != set(range(len(of_level))) for of_level in numbers.values())


def layers_of(adapter: Adapter) -> int:
    """Layers in a block of the UNet it is for, for names that are counted by it.

    Raises:
        ValueError: it does not say, and its modules are those of several UNets.
    """
    if (said := _said_layers(adapter)) is not None:
        return said
    last: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    for path in adapter.deltas:
        if found := _NUMBERED.match(path):
            of_side = last[found["side"]]
            of_side[found["level"]] = max(of_side.get(found["level"], 0), int(found["number"]))
    least = max([*(number + 1 for number in last["down"].values()), *last["up"].values()], default=2)
    if least >= 2:
        return least
    is_whole = set(last["down"].values()) == {0} and set(last["up"].values()) == {1}
    return 1 if is_whole and len(last["down"]) > 1 and len(last["up"]) > 1 else 2


def _said_layers(adapter: Adapter) -> int | None:
    said = _said(adapter, "layers_per_block")
    if said is None or (isinstance(said, int) and not isinstance(said, bool) and said >= 1):
        return said
    raise ValueError(f"its header gives {said!r} as the layers in a block, which is no number of layers")


def as_diffusers(adapter: Adapter) -> Adapter:
    """With the projections around attentions as the layers that diffusers has there, where the family is known."""
    linear = _LINEAR.get(str(_said(adapter, "family")))
    return adapter if linear is None else replace(adapter, deltas=_projected(adapter.deltas, linear))


def _projected(deltas: Deltas, linear: bool) -> Deltas:
    return {
        path: tuple(_laid_out(delta, linear) for delta in own) if _is_projection(path) else own
        for path, own in deltas.items()
    }


def _is_projection(path: str) -> bool:
    return path.startswith("unet.") and path.endswith((".proj_in", ".proj_out"))


def _laid_out(delta: Delta, linear: bool) -> Delta:
    leaves = laid_out(delta.leaves, (1, 1) if linear else (1, 1, 1, 1))
    if all(leaf is delta.leaves[name] for name, leaf in leaves.items()):
        return delta
    found = read_delta(delta.kind, leaves, delta.alpha)
    return with_strength_convention(found, delta.follows) if delta.follows else found
