"""Bases of flow-matching transformers in single files, with their other components from a folder or the hub.

A file may have the names of diffusers or those of the authors' code, with a prefix or without. Its family is told by
the names, and depth and widths by the shapes. What no shape tells is read from the transformer's configuration among
the components, if they have one, and else has the default of diffusers, which is that of the published models.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Digest, add_to_hash, new_digest
from diffgraft.bases.bundled_parts import bundled_parts
from diffgraft.bases.checkpoint_files import FLOAT_DTYPES
from diffgraft.bases.configs import read_object
from diffgraft.bases.family import Family
from diffgraft.bases.folder import WeightsFrom, build_pipeline, network_of, read_index
from diffgraft.bases.layout_names import layouts, transformer_in
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.original_weights import Place, find_weights, original_key
from diffgraft.bases.registry import families
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.bases.tensor_files import TensorFile, open_tensors
from diffgraft.errors import DiffgraftError, did_you_mean

SUFFIXES = (".safetensors", ".gguf")
"""Suffixes of files that may hold a transformer"""


class Loaded(NamedTuple):
    """A base that was read from a single file."""

    pipe: Any
    """Its diffusers pipeline"""
    digest: Digest | None
    """Digest over the denoiser's weights before they were cast; None if they were not read"""


@dataclass(frozen=True)
class TransformerFile:
    """An open file with the weights of a transformer."""

    file: TensorFile
    prefix: str
    """Prefix of the transformer's tensors in the file"""
    family: Family
    places: Mapping[str, Place]
    """Weight in diffusers → where the file has it, without the prefix"""

    def load(self, components: Path, weights: WeightsFrom, dtype: torch.dtype | None = None) -> Loaded:
        """Build the pipeline of this transformer and the other components.

        Args:
            components: diffusers folder of a base of the same family; of its transformer only the configuration is
                read, if it has one.
            weights: whether the components' weights are read; those of the transformer are, if they are.
            dtype: dtype of the transformer; None: that of most numbers in the file, or bfloat16 where those are
                quantized. Weights are hashed before they are cast.

        Raises:
            DiffgraftError: a weight is missing, or of another shape than the others tell, or the components are not
                those of such a transformer.
        """
        name, known = self.family.denoiser, {self.family.pipeline_class: self.family.components}
        index = read_index(components, known)
        self._check_others()
        network = self._network(components)
        self._check(network)
        parts = bundled_parts(self.file, self.family, components, index, is_read=weights == "files")
        pipe = build_pipeline(components, known, weights, {**parts, name: network})
        for what, wanted, given in self.family.paired_widths(pipe.components):
            if wanted != given:
                raise DiffgraftError(
                    f"{self.file.path} is a transformer for {what} of width {wanted}, but those of {components} have "
                    f"{given}: give the components of the model that it was trained from."
                )
        digest = self._fill(network, dtype or self.file.dtype()) if weights == "files" else None
        return Loaded(pipe, digest)

    def weights(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        """Yield name in diffusers, shape, and a function that reads it, of each weight in the file."""
        for name, place in self.places.items():
            shape = self._stored_shape(place)
            yield name, shape, partial(self._read, place, shape)

    def _check_others(self) -> None:
        """Raise DiffgraftError if the file has tensors of parts that are not read from such files."""
        prefixes = (self.prefix, *(start for starts in self.family.bundled.values() for start in starts))
        if others := [name for name in self.file.tensors if not name.startswith(prefixes)]:
            raise DiffgraftError(
                f"{self.file.path} holds {len(others)} tensors beside its transformer, such as {others[0]}, which are "
                f"not read for bases of {self.family.name}: keep those that begin with {self.prefix} in the file, and "
                "name components with the rest."
            )

    def _network(self, components: Path) -> nn.Module:
        """Create the transformer on the device ``meta``."""
        path = components / self.family.denoiser / "config.json"
        rest = read_object(path) if path.is_file() else {}
        rest.pop("quantization_config", None)  # those weights are not read
        shapes = ShapeTable(
            str(self.file.path), {name: self._stored_shape(place) for name, place in self.places.items()}
        )
        config = {**rest, **self.family.denoiser_config(shapes, rest)}
        kind = self.family.components[self.family.denoiser].classes[0]
        network: Any = network_of(self.file.path, kind, config, has_flow=True)
        own = network.config
        axes = own.get("axes_dims_rope") or own.get("axes_dims") or ()
        head = own.get("attention_head_dim") or own.get("dim", 0) // own.get("n_heads", 1)
        if axes and head and sum(axes) != head:
            raise DiffgraftError(
                f"{self.file.path} has attention heads of {head} channels, and no configuration tells how many of them "
                f"are for which axis of positions: give components with {self.family.denoiser}/config.json."
            )
        return network  # type: ignore[no-any-return]

    def _stored_shape(self, place: Place) -> tuple[int, ...]:
        return (place.stop - place.start, *self.file.tensors[self.prefix + place.key].shape[1:])

    def _check(self, network: nn.Module) -> None:
        """Compare names and shapes of the file with those of the network, before anything is read."""
        path, wanted = self.file.path, network.state_dict()
        problem = f"{path} is not a whole transformer of {self.family.name}"
        if missing := [name for name in wanted if name not in self.places]:
            raise DiffgraftError(
                f"{problem}: it lacks {len(missing)} of the {len(wanted)} weights that its sizes imply, such as "
                f"{self._name_in_file(missing[0])}. Download it again, or give a diffusers folder."
            )
        if others := [name for name in self.places if name not in wanted]:
            raise DiffgraftError(f"{problem}: {self._name_in_file(others[0])} does not belong to one of its sizes.")
        for name, value in wanted.items():
            place = self.places[name]
            shape, key = self._stored_shape(place), self.prefix + place.key
            if shape != value.shape and not self._is_flat(name, shape, value):
                part = f" in the rows from {place.start} to {place.stop}" if place.key != name else ""
                raise DiffgraftError(
                    f"{problem}: {key} has the shape {[*shape]}{part}, but by the other weights it is {[*value.shape]}."
                )
            kind = self.file.tensors[key].kind
            if path.suffix == ".safetensors" and kind not in FLOAT_DTYPES:
                raise DiffgraftError(f"{problem}: {key} is {kind}; weights are floating-point, or float8 with scales.")

    def _is_flat(self, name: str, shape: tuple[int, ...], value: Tensor) -> bool:
        """Whether a tensor of this shape is the weight `name` with all values on one axis, as the original has it."""
        assert self.family.original is not None
        parameter = self.family.original.find_parameter(name)
        return parameter is not None and parameter.is_flat and shape == (prod(value.shape),)

    def _name_in_file(self, name: str) -> str:
        """Return the name that a file with these names has for a weight of diffusers."""
        assert self.family.original is not None
        has_own = sum(place.key == own for own, place in self.places.items()) * 2 > len(self.places)
        return self.prefix + (name if has_own else original_key(self.family.original, name))

    def _fill(self, network: nn.Module, dtype: torch.dtype) -> Digest:
        """Read the weights of a network on ``meta``, one after the other, and return the digest over them."""
        digest, own = new_digest(), dict(network.named_parameters())
        state: dict[str, Tensor] = {}
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for name in sorted(shapes):
            value = self._read(self.places[name], shapes[name])
            if name in own:
                add_to_hash(digest, f"{self.family.denoiser}.{name}", value)
            state[name] = value.to(dtype)
        network.load_state_dict(state, assign=True)
        return digest

    def _read(self, place: Place, shape: tuple[int, ...]) -> Tensor:
        value = self.file.tensors[self.prefix + place.key].rows(place.start, place.stop)
        if place.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        return value.reshape(shape).contiguous()


@contextmanager
def open_transformer(path: Path, family: str | None = None) -> Iterator[TransformerFile | None]:
    """Open a file with a transformer; None if it holds none of a known family.

    Args:
        path: the file.
        family: name of the family that it is to be of; None: the one that its names tell.

    Raises:
        DiffgraftError: it cannot be read, or holds weights that its family does not have.
    """
    if path.suffix not in SUFFIXES or (family is not None and family not in layouts()):
        yield None
        return
    with open_tensors(path) as file:
        prefix, told = transformer_in([*file.tensors])
        if told is None or (family is not None and family != told):
            if family is not None:
                what = "the names of its weights are those of no known one" if told is None else f"it is one of {told}"
                raise DiffgraftError(f"{path} is not a transformer of {family}: {what}.")
            yield None
            return
        bundled = tuple(start for starts in families()[told].bundled.values() for start in starts)
        shapes = {
            name.removeprefix(prefix): shape
            for name, shape in file.shapes().items()
            if name.startswith(prefix) and not name.startswith(bundled)
        }
        try:
            places, unknown = find_weights(layouts()[told], shapes)
        except ValueError as error:
            raise DiffgraftError(f"{path} is not a whole transformer of {told}: {error}.") from error
        if unknown:
            raise DiffgraftError(_describe_unknown(f"{path} holds {prefix}", told, layouts()[told], unknown))
        yield TransformerFile(file, prefix, families()[told], places)


def _describe_unknown(start: str, family: str, layout: OriginalLayout, unknown: Sequence[str]) -> str:
    """Return the message on names that a family does not have, with the nearest name that it has."""
    name = unknown[0]
    number = match[0] if (match := re.search(r"\d+", name)) else "0"
    ends = {".bias", ".weight"} if not name.endswith(".scale") else {".scale"}
    known = {
        path.replace("*", number) + end
        for layer in layout.layers
        for path, own in ((layer.path, layer.weight), *((path, "weight") for path in layer.layers))
        for end in {".bias", f".{own}"} & ends
    }
    count = f"{len(unknown)} weights" if len(unknown) > 1 else "a weight"
    return f"{start}{name}, one of {count} that a transformer of {family} does not have; {did_you_mean(name, known)}"
