"""The base that an adapter is for: its family, and the number of layers in a block of its UNet.

Both are in the metadata under ``base``, from the header or from the base itself; otherwise they are inferred from
module names and shapes. All writers and operations use these functions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.original_names import PART, families_with, family_of_layers
from diffgraft.adapters.ops.effect import fitting_bases
from diffgraft.adapters.projections import match_conv_axes
from diffgraft.adapters.registry import with_leaves
from diffgraft.bases.ldm_keys import MAX_LEVELS, BlockLayout
from diffgraft.bases.shapes import FAMILY
from diffgraft.bases.weights import Weights
from diffgraft.errors import DiffgraftError

Deltas = Mapping[str, tuple[Delta, ...]]
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text states that cross-attentions read → family"""
_CONTEXT_LAYERS = (".attn2.to_k", ".attn2.to_v")
_LINEAR = {"sd1": False, "sd2": True, "sdxl": True}
"""Family → whether its projections around attentions are linear layers in diffusers, and not 1 × 1 convolutions"""
_SECOND_TRANSFORMER_BLOCK = re.compile(r"\.transformer_blocks\.(?!0\.)\d+\.")
_NUMBERED = re.compile(r"unet\.(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?:resnets|attentions)\.(?P<number>\d+)\.")
_LAYER_COUNTS = (2, 1, 3, 4)
"""Possible numbers of layers in a block of a UNet, the usual one first"""


def family_of(adapter: Adapter) -> str | None:
    """Family of the base that the adapter is for, from its metadata, module names or shapes; None if they do not tell.

    The shapes of all known bases may have to be computed for that, which takes seconds the first time.
    """
    return (
        base_entry(adapter.metadata, "family") or _family_by_names(adapter.deltas) or _family_by_shapes(adapter.deltas)
    )


def with_family(adapter: Adapter) -> Adapter:
    """Add the family to the metadata, if module names and widths tell it without computing the shapes of bases."""
    family = None if base_entry(adapter.metadata, "family") else _family_by_names(adapter.deltas)
    return with_base(adapter, family=family) if family else adapter


def with_inferred_family(adapter: Adapter) -> Adapter:
    """Add the family to the metadata, if `family_of` can infer it in any way."""
    if base_entry(adapter.metadata, "family"):
        return adapter
    family = family_of(adapter)
    return with_base(adapter, family=family) if family else adapter


def with_base(adapter: Adapter, **entries: Any) -> Adapter:
    """Add `entries` to the metadata entry ``base``."""
    known = adapter.metadata.get("base")
    base = {**(known if isinstance(known, Mapping) else {}), **entries}
    return replace(adapter, metadata={**adapter.metadata, "base": base})


def common_base_metadata(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Family, and layers per block, that all `adapters` are for, as far as they are known and equal.

    Raises:
        DiffgraftError: the adapters are for bases with different numbers of layers per block.
        ValueError: the metadata of one of them has an invalid number of layers.
    """
    families = {family_of(adapter) for adapter in adapters}
    layers = {count for adapter in adapters if (count := _layers_in_metadata(adapter)) is not None}
    if len(layers) > 1:
        raise DiffgraftError(
            f"The adapters are for UNets with {' and '.join(map(str, sorted(layers)))} layers per block; "
            "combine only adapters for the same base."
        )
    family = families.pop() if len(families) == 1 else None
    return {
        **({"family": family} if family else {}),
        **({"layers_per_block": layers.pop()} if layers else {}),
    }


def base_entry(metadata: Mapping[str, Any], key: str) -> Any:
    """Return a value of the metadata entry ``base``; None if there is no such value."""
    base = metadata.get("base")
    return base.get(key) if isinstance(base, Mapping) else None


def _family_by_names(deltas: Deltas) -> str | None:
    if of_transformer := _in_transformer(deltas):
        return family_of_layers({path: deltas[f"{PART}.{path}"] for path in of_transformer})
    if not may_be_sdxl(deltas):
        widths = _families_by_width(deltas) & {"sd1", "sd2"}
        return widths.pop() if len(widths) == 1 else None
    for path in deltas:
        if path.startswith(("text_encoder_2.", "unet.add_embedding.")) or _SECOND_TRANSFORMER_BLOCK.search(path):
            return "sdxl"
    widths = _families_by_width(deltas)
    return widths.pop() if len(widths) == 1 else None


def _in_transformer(paths: Iterable[str]) -> list[str]:
    """Paths inside a transformer, of those in it."""
    return [path.removeprefix(f"{PART}.") for path in paths if path.startswith(f"{PART}.")]


def _families_by_width(deltas: Deltas) -> set[str]:
    """Families that the widths of the cross-attentions' keys and values belong to."""
    families = set()
    for path, module_deltas in deltas.items():
        if path.startswith("unet.") and path.endswith(_CONTEXT_LAYERS):
            shape = next((shape for delta in module_deltas if (shape := delta.weight_shape)), None)
            if shape is not None and len(shape) > 1 and shape[1] in _WIDTHS:
                families.add(_WIDTHS[shape[1]])
    return families


def with_base_of(adapter: Adapter, weights: Weights) -> Adapter:
    """Add the family of a base to the metadata, and its layers per block if that is not 2."""
    family, layers = family_of_weights(weights), weights.layers_per_block
    entries = {
        **({"family": family} if family else {}),
        **({"layers_per_block": layers} if layers not in (None, 2) else {}),
    }
    return with_base(adapter, **entries) if entries else adapter


def family_of_weights(weights: Weights) -> str | None:
    """Family of a base; None for other bases than those known.

    It is told by the names of a transformer's layers, and for UNets by a second text encoder, or by the width of the
    text states that cross-attentions read.
    """
    shapes = weights.shapes()
    if of_transformer := _in_transformer(shapes):
        fitting = families_with(of_transformer)
        return fitting[0] if len(fitting) == 1 else None
    if any(path.startswith(("text_encoder_2.", "unet.add_embedding.")) for path in shapes):
        return "sdxl"
    widths = {_WIDTHS.get(shape[1]) for path, shape in shapes.items() if path.endswith(_CONTEXT_LAYERS)}
    return widths.pop() if len(widths) == 1 else None


def _family_by_shapes(deltas: Deltas) -> str | None:
    families = {FAMILY[name] for name in fitting_bases(deltas)} if deltas and not _in_transformer(deltas) else set()
    return families.pop() if len(families) == 1 else None


def may_be_sdxl(deltas: Deltas) -> bool:
    """Whether Stable Diffusion XL can have all modules: its UNet has three levels, the top one without attentions."""
    return not any(
        path.startswith(("unet.down_blocks.0.attentions.", "unet.up_blocks.2.attentions.", "unet.down_blocks.3."))
        or path.startswith("unet.up_blocks.3.")
        for path in deltas
    )


def to_diffusers_names(
    deltas_by_name: Mapping[str, Sequence[Delta]], layers: int | None = None
) -> tuple[dict[str, str], int]:
    """Map module names of the original UNet layout to diffusers' names, and find the number of layers per block.

    The original layout numbers layers through all blocks, so its names alone can be ambiguous. Then the reading is used
    that fits a known base, or the only one that leaves no gap between layers.

    Args:
        deltas_by_name: original module name → its deltas.
        layers: layers per block, if known.

    Raises:
        ValueError: no UNet has such names, or several readings are possible.
    """
    readings: dict[int, dict[str, str]] = {}
    reason = ""
    for count in _LAYER_COUNTS if layers is None else (layers,):
        blocks = BlockLayout(count, (True,) * MAX_LEVELS)
        try:
            readings[count] = {name: blocks.to_diffusers(name) for name in deltas_by_name}
        except ValueError as error:
            reason = reason or str(error)
    if not readings:
        raise ValueError(reason if layers is None else f"{reason} (this base has {layers} layers per block)")
    first = next(iter(readings.values()))
    if all(names == first for names in readings.values()):
        return first, 2 if 2 in readings else next(iter(readings))
    for count, names in readings.items():
        if fitting_bases({f"unet.{names[name]}": tuple(own) for name, own in deltas_by_name.items()}):
            return names, count
    gapless = [count for count, names in readings.items() if not _has_gaps(names.values())]
    if len(gapless) == 1:
        return readings[gapless[0]], gapless[0]
    counts = " or ".join(map(str, sorted(readings)))
    raise ValueError(
        f"its names number layers through all blocks, so it may be for a UNet with {counts} layers per block: "
        "apply it to the base it is for, which decides"
    )


def _has_gaps(paths: Iterable[str]) -> bool:
    """Whether a level has a layer but not the one before it; tools that adapt all layers of a kind leave no gap."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := _NUMBERED.match(f"unet.{path}."):
            numbers.setdefault((match["side"], match["level"]), set()).add(int(match["number"]))
    return any(level != set(range(len(level))) for level in numbers.values())


def layers_of(adapter: Adapter) -> int:
    """Layers per block of the UNet that the adapter is for, from its metadata or inferred from its modules.

    Raises:
        ValueError: the metadata has an invalid number of layers.
    """
    if (count := _layers_in_metadata(adapter)) is not None:
        return count
    last: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    for path in adapter.deltas:
        if match := _NUMBERED.match(path):
            by_level = last[match["side"]]
            by_level[match["level"]] = max(by_level.get(match["level"], 0), int(match["number"]))
    least = max([*(number + 1 for number in last["down"].values()), *last["up"].values()], default=2)
    if least >= 2:
        return least
    is_complete = set(last["down"].values()) == {0} and set(last["up"].values()) == {1}
    return 1 if is_complete and len(last["down"]) > 1 and len(last["up"]) > 1 else 2


def _layers_in_metadata(adapter: Adapter) -> int | None:
    return _layers_of_metadata(adapter.metadata)


def _layers_of_metadata(metadata: Mapping[str, Any]) -> int | None:
    count = base_entry(metadata, "layers_per_block")
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        return count
    raise ValueError(f"its header has layers_per_block={count!r}; expected a whole number of at least 1")


def usual_layers(metadata: Mapping[str, Any]) -> int:
    """Layers per block of the UNet in the metadata; without them those of Stable Diffusion.

    Raises:
        ValueError: the metadata has an invalid number of layers.
    """
    return _layers_of_metadata(metadata) or _LAYER_COUNTS[0]


def with_diffusers_projections(adapter: Adapter) -> Adapter:
    """Give the projections around attentions the axes that they have in diffusers, if the family is known."""
    linear = _LINEAR.get(str(base_entry(adapter.metadata, "family")))
    return adapter if linear is None else replace(adapter, deltas=_with_projections(adapter.deltas, linear))


def _with_projections(deltas: Deltas, linear: bool) -> Deltas:
    return {
        path: tuple(_with_axes(delta, linear) for delta in module_deltas) if _is_attention_proj(path) else module_deltas
        for path, module_deltas in deltas.items()
    }


def _is_attention_proj(path: str) -> bool:
    return path.startswith("unet.") and path.endswith((".proj_in", ".proj_out"))


def _with_axes(delta: Delta, linear: bool) -> Delta:
    """The delta for a linear layer, or for a 1 × 1 convolution."""
    leaves = match_conv_axes(delta.leaves, (1, 1) if linear else (1, 1, 1, 1))
    if all(leaf is delta.leaves[name] for name, leaf in leaves.items()):
        return delta
    return with_leaves(delta, leaves)
