"""Weights of a transformer under the names of its authors' code, found for the names of diffusers, and the reverse.

Both kinds of names may stand in a single file. A fused layer of the original layout holds several weights of diffusers,
as ranges of its rows.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffgraft.bases.original_layout import OriginalLayout

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a file has a weight of diffusers: in which tensor, and in which of its rows."""

    key: str
    """Name of the tensor"""
    start: int
    """First of its rows"""
    stop: int
    """Row after the last"""
    swapped: bool = False
    """Whether the two halves of the rows are the other way around in diffusers"""


def find_weights(layout: OriginalLayout, shapes: Mapping[str, Shape]) -> tuple[dict[str, Place], list[str]]:
    """Find the weights of diffusers in the tensors of a file.

    Args:
        layout: the family's table of names.
        shapes: name → shape of each tensor, without the prefix of the denoiser.

    Returns:
        Name in diffusers → place in the file; and the names that the layout does not know, in the order of the file.

    Raises:
        ValueError: two tensors hold the same weight, or a fused layer cannot be divided.
    """
    places: dict[str, Place] = {}
    unknown = []
    for key in shapes:
        if layout.is_unused(key):
            continue
        found = dict(_weights_at(layout, key, shapes))
        if not found:
            unknown.append(key)
        if twice := places.keys() & found:
            name = min(twice)
            raise ValueError(f"both {places[name].key} and {key} hold {name}")
        places |= found
    return places, unknown


def is_weight(layout: OriginalLayout, key: str) -> bool:
    """Whether a tensor called `key` is a weight of this layout, in the names of either."""
    path, _, end = key.rpartition(".")
    if layout.is_unused(key) or layout.find_parameter(key):
        return True
    return end in ("weight", "bias", "scale") and layout.find(path) is not None


def _weights_at(layout: OriginalLayout, key: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Place]]:
    """Yield name in diffusers, and place, of the weights that the tensor `key` holds; none if it is unknown."""
    rows = shapes[key][0] if shapes[key] else 1
    if parameter := layout.find_parameter(key):
        yield parameter.name, Place(key, 0, rows)
        return
    path, _, end = key.rpartition(".")
    named = layout.find(path)
    if named is None:
        return
    layer = named.layer
    if path in layer.layers and end in ("weight", "bias"):  # a name in diffusers, or one that both layouts have
        yield key, Place(key, 0, rows)
    elif path == layer.path and end in (layer.weight, "bias"):
        weight = shapes.get(f"{path}.{layer.weight}", ())
        swapped = layer.swapped and len(weight) == 2 and weight[0] == 2 * weight[1]
        for name, (start, stop) in zip(layer.layers, layer.bounds(rows), strict=True):
            yield f"{name}.{'bias' if end == 'bias' else 'weight'}", Place(key, start, stop, swapped)


def original_key(layout: OriginalLayout, name: str) -> str:
    """Return the original name of the tensor that holds the weight `name` of diffusers.

    Raises:
        ValueError: the layout has no such weight.
    """
    if parameter := layout.find_parameter(name):
        return parameter.original
    path, _, end = name.rpartition(".")
    named = layout.find(path)
    if named is None or end not in ("weight", "bias"):
        raise ValueError(f"{name} is not a weight of a known layer")
    return f"{named.layer.path}.{named.layer.weight if end == 'weight' else end}"


def original_state_dict(layout: OriginalLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a denoiser of diffusers under their original names, with the fused layers joined.

    Raises:
        ValueError: the layout lacks a weight, or the denoiser lacks a part of a fused layer.
    """
    original: dict[str, Tensor] = {}
    for name, value in state.items():
        key = original_key(layout, name)
        path, _, end = name.rpartition(".")
        if parameter := layout.find_parameter(name):
            original[key] = value.flatten() if parameter.is_flat else value
            continue
        named = layout.find(path)
        assert named is not None
        layer = named.layer
        if named.part not in (None, 0):
            continue  # its first part brings the others along
        parts = [f"{part}.{end}" for part in layer.layers]
        if missing := [part for part in parts if part not in state]:
            raise ValueError(f"{key} holds {', '.join(parts)}, and the denoiser has no {missing[0]}")
        joined = value if len(parts) == 1 else torch.cat([state[part] for part in parts])
        weight = state[f"{path}.weight"]
        swapped = layer.swapped and len(weight) == 2 * weight.shape[-1]
        original[key] = torch.cat(joined.chunk(2)[::-1]) if swapped else joined
    return original
