"""The adapter in memory: what it does to each module of a base, and what is known about it. No base is needed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Delta(ABC):
    """What a method does to one module.

    The contract is `apply`: weight and bias in, weight and bias out, in float32. Methods that are a function of the
    weight need no more; methods that add a matrix are `LinearDelta`.
    """

    kind: str
    """Which kind of delta it is: the name of the `Method` that reads its leaves again."""
    leaves: Mapping[str, Tensor]
    """The tensors it consists of, by their canonical names."""
    alpha: float | None
    """What its scale is made of; None where it has no scale."""
    follows: str | None = None
    """Whose way of strengths other than 1 it follows, where tools differ in that."""
    is_lora: bool = False
    """Whether its leaves are those of LoRA (perhaps with DoRA), which every tool reads."""
    is_low_rank: bool = False
    """Whether it adds the product of two thin matrices, as LoRA and LoHa do."""

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape [out, in] or [out, in, height, width] of the weight it is for; None where its leaves do not tell.

        Raises:
            IndexError, RuntimeError, ValueError: its leaves have too many axes or too few.
        """
        return None

    @property
    def matrix_shape(self) -> tuple[int, ...] | None:
        """Shape [out, in · height · width] of the weight as a matrix, which more leaves tell; else `weight_shape`."""
        return self.weight_shape

    @abstractmethod
    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """The module's weight [out, in, …] and bias [out] under this delta at `strength`. The inputs stay untouched."""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {'×'.join(map(str, leaf.shape)) or 'scalar'}" for name, leaf in self.leaves.items())
        return f"{type(self).__name__}({self.kind}: {sizes})"

    @abstractmethod
    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether it can be applied to a weight of this shape."""


class LinearDelta(Delta):
    """A delta that adds a matrix of its own, whatever the weight: these sum, and merge exactly."""

    @abstractmethod
    def delta(self, weight_shape: tuple[int, ...]) -> Tensor:
        """ΔW in float32, scale included, in the shape of the weight."""

    def thin_product(self, strength: float) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002  (others have one)
        """`up` [out, r] and `down` [r, in · height · width] in float32, with up · down = strength · ΔW as a matrix.

        None where it is not the product of two thin matrices.
        """
        return None

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        return weight.float() + strength * self.delta(tuple(weight.shape)).to(weight.device), bias


class Network(ABC):
    """What a method does to what layers are given, where no weight could say it: a network beside the base."""

    kind: str
    """Which kind of network it is: the name of the `Method` that reads it again."""
    tensors: Mapping[str, Tensor]
    """Its weights, by name."""
    settings: Mapping[str, Any]
    """What else it takes to build it, in JSON's types."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}: {len(self.tensors)} tensors)"

    @abstractmethod
    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        """Lay it over live parts of a base; what is returned takes it off again.

        Raises:
            ValueError: it was made for a base of other widths.
        """


_WRITERS: list[Callable[[Any, Path, str], Path]] = []
"""What `Adapter.save` calls; the formats, which know adapters and are not known here, put themselves in"""


def writes_adapters(write: Callable[[Any, Path, str], Path]) -> Callable[[Any, Path, str], Path]:
    """Have `Adapter.save` call the function that is decorated: adapter, path and dialect → the path."""
    _WRITERS.append(write)
    return write


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Deltas by module path, networks, new words, and metadata.

    A path is the part of the pipeline and the module inside it in diffusers' naming, without the level
    ``text_model`` that transformers has dropped: ``unet.mid_block.attentions.0.proj_in``,
    ``text_encoder.encoder.layers.0.self_attn.q_proj``. A module may have several deltas; they apply in order.
    """

    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the header says: method, rank, alpha, trigger, class, base (family, hash), recipe, seed, …"""
    networks: tuple[Network, ...] = ()
    """Networks that lie over the base, each seeing what the one before it made."""
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Words it adds to the tokenizers: word → text encoder → vectors [n, width]."""

    def __repr__(self) -> str:
        held = [f"{len(self.deltas)} modules"] if self.deltas else []
        held += [f"{len(self.networks)} networks"] if self.networks else []
        held += [f"word {word!r}" for word in self.tokens]
        return f"Adapter({self.method}: {', '.join(held) or 'nothing'})"

    @property
    def method(self) -> str:
        """Name of the method that made it, `unknown` where the file does not say."""
        return str(self.metadata.get("method", "unknown"))

    @property
    def modules(self) -> list[str]:
        """Paths of the modules it changes."""
        return list(self.deltas)

    def save(self, path: str | Path, format: str = "auto") -> Path:  # noqa: A002  (the public face says `format`)
        """Write it to `path` in a dialect of `diffgraft.adapters.formats`; nothing half-written gets that name.

        By default it is the one that most programs open, of those that can hold it: a word alone as diffusers and webui
        have it, weights under kohya's names, else diffusers' or this project's own layout.
        """
        if not _WRITERS:  # whoever has an adapter need not have read a file before
            import_module("diffgraft.adapters.formats")
        return _WRITERS[-1](self, Path(path), format)
