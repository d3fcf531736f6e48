"""The adapter in memory: what it does to each module of a base, and its metadata. It does not need a base."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffgraft.adapters.rank_schedule import RankSchedule


class Delta(ABC):
    """The change that an adapter makes to the weight and bias of one module.

    The contract is `apply`: weight and bias in, weight and bias out, in float32. Methods that compute a function of the
    weight implement `apply` directly; methods that add a matrix subclass `LinearDelta`.
    """

    kind: str
    """Kind of the delta: the name of the `Method` that reads its leaves again."""
    leaves: Mapping[str, Tensor]
    """Tensors that the delta consists of, by their canonical names."""
    alpha: float | None
    """Alpha, from which the scale is computed; None if the delta has no scale."""
    strength_convention: str | None = None
    """Tool, such as `peft`, that defines what strengths other than 1 mean for this delta; None where tools agree."""
    rank_schedule: "RankSchedule | None" = None
    """How many ranks act at a timestep; None: all of them at all timesteps. `apply` always applies all of them."""
    is_lora: bool = False
    """Whether the leaves are those of LoRA (possibly with DoRA), which every tool reads."""
    is_low_rank: bool = False
    """Whether the delta adds the product of two thin matrices, as LoRA and LoHa do."""

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape [out, in] or [out, in, height, width] of the adapted weight; None if the leaves do not determine it.

        Raises:
            IndexError, RuntimeError, ValueError: the leaves have too many or too few axes.
        """
        return None

    @property
    def matrix_shape(self) -> tuple[int, ...] | None:
        """Shape [out, in · height · width] of the weight as a matrix, if leaves tell only that; else `weight_shape`."""
        return self.weight_shape

    @abstractmethod
    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """Apply the delta to a module's weight [out, in, …] and bias [out] at `strength`, without modifying the inputs.

        Returns:
            The new weight and bias, in float32.
        """

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {'×'.join(map(str, leaf.shape)) or 'scalar'}" for name, leaf in self.leaves.items())
        return f"{type(self).__name__}({self.kind}: {sizes})"

    @abstractmethod
    def fits(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether the delta can be applied to a weight of this shape."""


class LinearDelta(Delta):
    """A delta that adds a matrix which does not depend on the weight; such deltas can be summed and merged exactly."""

    @abstractmethod
    def delta(self, weight_shape: tuple[int, ...]) -> Tensor:
        """Compute ΔW in float32, scale included, in the shape of the weight."""

    def low_rank_factors(self, strength: float) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002  (subclasses use it)
        """Return `up` [out, r] and `down` [r, in · height · width] with up · down = strength · ΔW, in float32.

        Returns None if ΔW is not the product of two thin matrices.
        """
        return None

    def apply(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        return weight.float() + strength * self.delta(tuple(weight.shape)).to(weight.device), bias


class Network(ABC):
    """A trained network beside the base, such as a hypernetwork, that changes the inputs of layers.

    It cannot be merged into the weights of the base.
    """

    kind: str
    """Kind of the network: the name of the `Method` that reads it again."""
    tensors: Mapping[str, Tensor]
    """Weights of the network, by name."""
    settings: Mapping[str, Any]
    """Further settings needed to build the network, as JSON types."""
    acts_on: Literal["denoiser", "text_encoder"] = "denoiser"
    """Part of the base whose strength applies to the network."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}: {len(self.tensors)} tensors)"

    replaces_denoiser = False
    """Whether it computes in the place of the denoiser, whose layers then have no effect."""

    @abstractmethod
    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        """Hook the network into live parts of a base, and return a function that removes it again.

        Raises:
            ValueError: the network was made for a base of other widths.
        """


_WRITERS: list[Callable[[Any, Path, str], Path]] = []
"""Functions that `Adapter.save` calls; `diffgraft.adapters.formats` registers itself here, as it imports this module"""


def register_adapter_writer(write: Callable[[Any, Path, str], Path]) -> Callable[[Any, Path, str], Path]:
    """Register the decorated function, (adapter, path, dialect) → path, as the one that `Adapter.save` calls."""
    _WRITERS.append(write)
    return write


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Deltas by module path, networks, learned words, and metadata.

    A module path is the part of the pipeline and the module inside it in diffusers' naming, without the level
    ``text_model`` that transformers has dropped: ``unet.mid_block.attentions.0.proj_in``,
    ``text_encoder.encoder.layers.0.self_attn.q_proj``. A module can have several deltas; they are applied in order.
    """

    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Contents of the file's header: method, rank, alpha, trigger, class, base (family, hash), recipe, seed, …"""
    networks: tuple[Network, ...] = ()
    """Networks hooked into the base in this order; each receives the output of the previous one."""
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Words that the adapter adds to the tokenizers: word → text encoder → embeddings [n, width]."""

    def __repr__(self) -> str:
        contents = [f"{len(self.deltas)} modules"] if self.deltas else []
        contents += [f"{len(self.networks)} networks"] if self.networks else []
        contents += [f"word {word!r}" for word in self.tokens]
        return f"Adapter({self.method}: {', '.join(contents) or 'nothing'})"

    @property
    def method(self) -> str:
        """Name of the method that trained the adapter; `unknown` if the file does not say."""
        return str(self.metadata.get("method", "unknown"))

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that the adapter changes."""
        return list(self.deltas)

    def save(self, path: str | Path, format: str = "auto") -> Path:  # noqa: A002  (the public face says `format`)
        """Write the adapter to `path` in a dialect of `diffgraft.adapters.formats`; no partial file is ever left there.

        The default ``auto`` selects the dialect that most programs open among those that can hold the adapter: for a
        single word the files of diffusers and webui, for weights kohya's names, else diffusers' or the project's own
        layout.
        """
        if not _WRITERS:  # an adapter made in memory does not need the formats before it is saved
            import_module("diffgraft.adapters.formats")
        return _WRITERS[-1](self, Path(path), format)
