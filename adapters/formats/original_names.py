"""Modules of transformers under the names of files: those of the original layout, or those of diffusers.

Files name layers as the authors' code or as diffusers does, with dots or with underscores for them; a fused layer of
the original layout is several layers in diffusers. The families say how (`Family.original`). Which family a file is
for is told by its names, and where two families have the same names for different layers, by the shapes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.formats.join_deltas import join_deltas
from diffgraft.adapters.formats.row_blocks import join_rows, rows_and_columns, split_fused, split_rows
from diffgraft.adapters.methods.ia3 import Ia3Delta
from diffgraft.bases.layout_names import layouts
from diffgraft.bases.original_layout import NamedLayer, OriginalLayer, OriginalLayout
from diffgraft.bases.registry import families
from diffgraft.errors import did_you_mean

PART = "transformer"
"""Name of the denoiser that these layers are in"""
Modules = Mapping[str, tuple[str, Sequence[Delta]]]
"""Key of a module → its name in the file, without the prefix of its part, and its deltas"""


_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


class ReadLayers(NamedTuple):
    """Layers of diffusers that the modules of a file change."""

    layers: dict[str, list[tuple[str, tuple[Delta, ...]]]]
    """Key of a module → path inside the denoiser in diffusers, and deltas, of each layer that it stands for"""
    family: str | None
    """Family that the file is for; None if its modules are named alike in several"""


@cache
def is_known(name: str) -> bool:
    """Whether `name`, without the prefix of its part, is that of a layer in one of the families' denoisers."""
    return any(layout.find(name) for layout in layouts().values())


@cache
def is_of_diffusers(name: str) -> bool:
    """Whether `name` is the path in diffusers, with dots, of a layer in one of the families' denoisers."""
    return any(_part_at(layout, name) for layout in layouts().values())


def is_for_transformer(adapter: Adapter) -> bool:
    """Whether an adapter changes a denoiser that has an original layout."""
    return any(path.startswith(f"{PART}.") for path in adapter.deltas)


def families_with(paths: Iterable[str]) -> list[str]:
    """Names of the families whose denoiser has layers with all these `paths` in diffusers."""
    paths = list(paths)
    return [name for name, layout in layouts().items() if all(_part_at(layout, path) for path in paths)]


def family_of_layers(deltas: Mapping[str, Sequence[Delta]]) -> str | None:
    """Name of the family that the layers of an adapter tell, by their paths in diffusers, or by width and number.

    A file for attentions alone fits several families, whose published bases differ in one of the two.

    Args:
        deltas: path in diffusers, inside the denoiser → deltas.
    """
    fitting = families_with(deltas)
    numbers = [int(match[1]) for path in deltas if (match := _BLOCK.match(path))]
    if len(fitting) > 1 and numbers:
        widths = {_shape(own)[0] for path, own in deltas.items() if path.endswith(".attn.to_q")}
        fitting = [name for name in fitting if {(width, max(numbers) + 1) for width in widths} & layouts()[name].sizes]
    return fitting[0] if len(fitting) == 1 else None


def _part_at(layout: OriginalLayout, path: str) -> NamedLayer | None:
    """The original layer that has the outputs of the layer at `path` in diffusers."""
    found = layout.find(path)
    if found is not None and found.part is None:  # a name that both layouts have, for one layer
        found = found._replace(part=0) if found.layer.layers == (path,) else None
    return found if found is not None and found.layer.layers[found.part or 0] == path else None


def read_layers(modules: Modules, family: str | None = None) -> ReadLayers:
    """Find the layers of diffusers for the modules of a file, and split the deltas of fused layers.

    Args:
        modules: modules of a file, all inside the denoiser.
        family: family that the file's header names; None if it does not.

    Raises:
        ValueError: a name is unknown, the names fit several families, or a delta cannot be split.
    """
    found = {name: [layout.find(module) for module, _ in modules.values()] for name, layout in layouts().items()}
    fitting = {name: layers for name, layers in found.items() if all(layers)}
    if not fitting:
        raise ValueError(_describe_unknown(found, [module for module, _ in modules.values()]))
    if family in fitting:
        fitting = {family: fitting[family]}
    named = fitting
    if len({tuple(map(_meaning, layers)) for layers in fitting.values()}) > 1:
        fitting = {
            name: layers
            for name, layers in fitting.items()
            if all(_fits(layer, own) for layer, (_, own) in zip(layers, modules.values(), strict=True) if layer)
        }
    if len({tuple(map(_meaning, layers)) for layers in fitting.values()}) != 1:
        first, among = next(iter(modules.values()))[0], ", ".join(fitting or named)
        raise ValueError(
            f"several families have layers with the names of its modules, such as {first}, and by shape they are those "
            f"of {'more than one' if fitting else 'none'} of {among}: convert it with the program that it is from"
        )
    layers = next(iter(fitting.values()))
    result = {
        key: _layers_of(layer, tuple(deltas))
        for (key, (_, deltas)), layer in zip(modules.items(), layers, strict=True)
        if layer
    }
    return ReadLayers(result, next(iter(fitting)) if len(fitting) == 1 else None)


def _meaning(named: NamedLayer | None) -> object:
    """What a name stands for, equal for two families if they have the same layers of diffusers for it."""
    assert named is not None
    layer, part = named
    is_single = len(layer.layers) == 1 and not layer.swapped
    return layer.layers[part or 0] if part is not None or is_single else (layer.layers, layer.shares, layer.swapped)


def _fits(named: NamedLayer, deltas: Sequence[Delta]) -> bool:
    """Whether deltas have the proportions of a layer, as far as both are known."""
    rows, columns = _shape(deltas)
    return named.part is not None or rows is None or columns is None or named.layer.has_shape(rows, columns)


def _shape(deltas: Sequence[Delta]) -> tuple[int | None, int | None]:
    """Rows and columns of the weight that `deltas` are for; None for what they do not tell."""
    shapes = [rows_and_columns(delta) for delta in deltas]
    rows, columns = (next((shape[axis] for shape in shapes if shape[axis] is not None), None) for axis in (0, 1))
    return rows, columns


def _layers_of(named: NamedLayer, deltas: tuple[Delta, ...]) -> list[tuple[str, tuple[Delta, ...]]]:
    """Paths in diffusers, and deltas, of the layers that a module of a file stands for."""
    layer, part = named
    if part is not None:
        return [(layer.layers[part], deltas)]
    if len(layer.layers) == 1:
        return [(layer.layers[0], _with_halves_in_order(layer, deltas))]
    try:
        rows = _rows(layer, deltas)
        blocks = [split_fused(delta, layer.bounds(rows)) for delta in deltas]
    except ValueError as error:
        raise ValueError(
            f"{layer.path} is {len(layer.layers)} layers in diffusers, and what the file has for it cannot be divided "
            f"among them, as {error}: convert it to a LoRA with the program that it was trained with"
        ) from error
    parts = [tuple(delta for block in own for delta in block) for own in zip(*blocks, strict=True)]
    return [(path, own) for path, own in zip(layer.layers, parts, strict=True) if own]


def _rows(layer: OriginalLayer, deltas: Sequence[Delta]) -> int:
    """Number of rows of the weight that `deltas` are for. Raises ValueError if they do not tell."""
    rows, _ = _shape(deltas)
    if rows is None and all(isinstance(delta, Ia3Delta) for delta in deltas):
        return 2 * sum(layer.shares)  # factors on inputs are those of every part, whatever its rows
    if rows is None:
        raise ValueError(f"it is of kind {deltas[0].kind}, which does not tell how many outputs the layer has")
    return rows


def _with_halves_in_order(layer: OriginalLayer, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """Exchange the two halves of the rows, if the layer has only shift and scale and they are `swapped`."""
    if not layer.swapped:
        return deltas
    rows, columns = _shape(deltas)
    if columns is None and layer.shape is None:
        raise ValueError(f"what it has for {layer.path} does not tell whether that has only a shift and a scale")
    if rows is None or columns is None:
        rows, columns = layer.shape or (0, 0)
    if rows != 2 * columns:
        return deltas
    swapped: list[Delta] = []
    try:
        half = _rows(layer, deltas) // 2
        for delta in deltas:
            first, second = split_rows(delta, [(0, half), (half, 2 * half)])
            swapped += join_rows([second, first], [half, half])
    except ValueError as error:
        raise ValueError(
            f"shift and scale of {layer.path} are the other way around in diffusers, but {error}"
        ) from error
    return tuple(swapped)


def _describe_unknown(found: Mapping[str, Sequence[NamedLayer | None]], names: Sequence[str]) -> str:
    """Half-sentence on a name that no family has beside the others, with the nearest name of the nearest family."""
    family = max(found, key=lambda name: sum(layer is not None for layer in found[name]))
    unknown = next(name for name, layer in zip(names, found[family], strict=True) if layer is None)
    for slot in families()[family].conditioners:
        starts = families()[family].bundled.get(slot.component, ())
        if unknown.replace(".", "_").startswith(tuple(start.replace(".", "_") for start in starts)):
            return (
                f"it changes {unknown}, a layer of the {slot.component} of {family}, which stays frozen here: train it "
                "without such layers"
            )
    number = match[0] if (match := re.search(r"\d+", unknown)) else "0"
    paths = [path for layer in layouts()[family].layers for path in (layer.path, *layer.layers)]
    known = {path.replace("*", number) for path in paths}
    if "." not in unknown:
        known = {path.replace(".", "_") for path in known}
    return f"it has the module {unknown}, which {family} does not have, the family of the others; " + did_you_mean(
        unknown, known
    ).rstrip(".?")


def write_layers(adapter: Adapter, family: str | None) -> dict[str, tuple[Delta, ...]]:
    """Join the deltas of a transformer's layers to those of the original layout.

    Args:
        adapter: an adapter; modules of other parts are left out.
        family: family that it is for; None: the one that its modules tell.

    Returns:
        Path in the original layout → at most one delta of its weight and one of its bias.

    Raises:
        ValueError: the family is unknown, or the deltas of the parts of a fused layer cannot be joined.
    """
    own = {p.removeprefix(f"{PART}."): deltas for p, deltas in adapter.deltas.items() if p.startswith(f"{PART}.")}
    if not own:
        return {}
    fitting = families_with(own)
    if family not in fitting:
        if len({str(_places_in(name, own)) for name in fitting}) != 1:
            among = f"may be for {', '.join(fitting)}" if fitting else "are those of no known family"
            raise ValueError(
                f"these files have names that depend on the family, and its modules {among}: name the base (--base)"
            )
        family = fitting[0]
    layout = layouts()[family]
    groups: dict[str, tuple[OriginalLayer, dict[str, tuple[Delta, ...]]]] = {}
    for path, deltas in own.items():
        named = _part_at(layout, path)
        assert named is not None
        groups.setdefault(named.layer.path, (named.layer, {}))[1][path] = tuple(deltas)
    return {path: _original_deltas(layer, parts) for path, (layer, parts) in groups.items()}


def _places_in(family: str, paths: Iterable[str]) -> dict[str, NamedLayer | None]:
    """Path in diffusers → the layer of a family's original layout that has its outputs."""
    return {path: _part_at(layouts()[family], path) for path in paths}


def _original_deltas(layer: OriginalLayer, parts: Mapping[str, tuple[Delta, ...]]) -> tuple[Delta, ...]:
    """Deltas of an original layer from those of its parts, by path in diffusers."""
    if len(layer.layers) == 1:
        deltas = join_deltas(f"{PART}.{layer.layers[0]}", parts[layer.layers[0]])
        return _with_halves_in_order(layer, deltas)
    in_order = [parts.get(path, ()) for path in layer.layers]
    try:
        joined = [
            deltas if all(delta.kind == "lokr" for delta in deltas) else join_deltas(f"{PART}.{path}", deltas)
            for path, deltas in zip(layer.layers, in_order, strict=True)
        ]
        told = {part: rows for part, own in enumerate(joined) if (rows := _shape(own)[0]) is not None}
        units = {rows // layer.shares[part] for part, rows in told.items()} or {1}
        unit = units.pop()
        if units or any(rows != unit * layer.shares[part] for part, rows in told.items()):
            raise ValueError("their numbers of outputs do not fit together")
        return join_rows(joined, [unit * share for share in layer.shares])
    except ValueError as error:
        names = ", ".join(path for path in layer.layers if path in parts)
        raise ValueError(f"such files have {layer.path} in the place of {names}, but {error}") from error
