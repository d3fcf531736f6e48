"""The contract of a method, with a template for a new one.

A new method is one module of `diffgraft.adapters.methods`, or of an outside package that lists it in the entry-point
group ``diffgraft.methods``. A method that adds a matrix ΔW only defines how ΔW is computed from its leaves; the live
layer, the delta in memory, saving and loading are in `factors.py` and `patch.py`::

    class Rows(Factors):                                     # one number for each output, added to its whole row
        kind = "rows"

        def init_leaves(self, shape, rank, generator):       # [out, in] or [out, in / groups, h, w] → leaves, ΔW = 0
            return {"rows": torch.zeros(shape[0])}

        def rank(self, leaves):                              # divides alpha: the scale of ΔW is alpha / rank
            return 1

        def weight(self, leaves, shape):                     # leaves → ΔW without its scale, in `shape`
            return leaves["rows"].view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def attach(target, spec):                                # called once, before training
        return AttachedLayers(target, spec, lambda path, layer, rng: FactorLayer(Rows(), layer, 1, 1.0, rng))

    def read(leaves, alpha):                                 # called for each module of a file
        return FactorDelta(Rows(), leaves, alpha)

    METHOD = Method(name="rows", summary="one number for each output", attach=attach, read=read)

How the functions are called:

- `Method.read_options` and `Method.unsupported` when a recipe is read; the latter names keys that have no meaning here.
- `Method.attach` when a run starts. It receives the live base and a `Spec`, and returns an `Attached`.
- `Attached.trainable`, `lr_scales` and `paths` once, to build the optimizer; `after_step` after each of its steps.
- `Attached.adapter` for checkpoints, samples and the final file: float32 tensors on the CPU.
- `Method.read` or `Method.read_network` for each module of an adapter file that has this kind.
- A `Delta` that is not W + ΔW overrides `Delta.apply`: weight [out, in, …] and bias [out] in, the same shapes out.

Everything else (formats, merging, stacking, converting, the test matrices) finds the method through
`diffgraft.adapters.registry`. The command ``diffgraft methods`` lists methods without importing torch, so `name` and
`summary` must be string literals, passed by keyword.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta, Network
from diffgraft.bases.layers import is_of_text
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.strict import validated

N = TypeVar("N", bound=Network)
ReadDelta = Callable[[Mapping[str, Tensor], float | None], Delta]
ReadNetwork = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Network]
NO_FACTORS = dict.fromkeys(("rank", "alpha"), "it has no low-rank factors")
"""Value of `Method.unsupported` for methods that have no low-rank factors"""


class Options(BaseModel):
    """The options of a method (`options.NAME=VALUE` in a recipe); a method with options of its own subclasses it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Attached(nn.Module):
    """A method applied to a live base: it changes what the base computes, and its parameters are trained.

    Its parameters are separate from those of the base, which are not changed.
    """

    is_disabled = False
    """Whether the method is switched off for now, within `disabled`"""
    strength = 1.0
    """Strength that the method acts with for now, within `at_strength`"""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, always in the same order."""

    @abstractmethod
    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        """Copy the current values into an `Adapter` with this metadata, in float32 on the CPU."""

    def load(self, adapter: Adapter) -> set[str]:  # noqa: ARG002  (subclasses use it)
        """Start training from the values, ranks and scales of `adapter`.

        Returns:
            Paths, as in `paths`, of the modules that `adapter` has weights for; all others keep their initial values.

        Raises:
            ValueError: `adapter` holds something that this method cannot train, or does not fit the base. This object
                must not be used after that.
        """
        raise ValueError("this method does not support init_from")

    @abstractmethod
    def detach(self) -> None:
        """Remove the method from the base, which then has its original parameters, bit for bit."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the method off within the block; added words stay, with their initial embeddings."""
        self.is_disabled = True
        try:
            yield
        finally:
            self.is_disabled = False

    @property
    def has_strength(self) -> bool:
        """Whether the method can act with other strengths while it is trained."""
        return False

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Return a block within which the method acts with a strength, as a file of it does; needs `has_strength`."""
        return self._acting_as(self.is_disabled, strength)

    def as_now(self) -> AbstractContextManager[None]:
        """Return a block within which the method acts as it does now, for gradient checkpointing."""
        return self._acting_as(self.is_disabled, self.strength)

    @contextmanager
    def _acting_as(self, is_disabled: bool, strength: float) -> Iterator[None]:
        before = self.is_disabled, self.strength
        self.is_disabled, self.strength = is_disabled, strength
        try:
            yield
        finally:
            self.is_disabled, self.strength = before

    def lr_scales(self) -> dict[str, float]:
        """Learning-rate scale by parameter name; parameters that are not listed have a scale of 1."""
        return {}

    def paths(self) -> dict[str, str]:
        """Name of each trainable parameter → path of its module, as in `Adapter.deltas`."""
        return {name: strip_text_model(name.rpartition(".")[0]) for name in self.trainable()}

    def detach_modules(self, paths: Collection[str]) -> None:
        """Remove the method from the modules at `paths` only, so that they are not trained.

        Methods that do not adapt single modules ignore the call.
        """

    def after_step(self) -> None:
        """Called after each optimizer step, for example to rescale parameters."""

    @property
    def control(self) -> nn.Module | None:
        """Network that steers the denoiser by condition pictures (`Family.control_network`); None without one."""
        return None

    @property
    def trained_network(self) -> nn.Module | None:
        """Whole network that is trained, beside the denoiser or in its place; None for methods that adapt layers."""
        return self.control

    @property
    def affects_text_encoder(self) -> bool:
        """Whether the method changes the outputs of text encoders: it adapts their modules, or adds tokens."""
        return any(is_of_text(path) for path in self.paths().values())

    @property
    def trains_text(self) -> bool:
        """Whether the outputs of text encoders still change during training."""
        paths, trained = self.paths(), self.trainable()
        return any(value.requires_grad and is_of_text(paths[name]) for name, value in trained.items())


@dataclass(frozen=True)
class Spec:
    """The layers that `Method.attach` adapts, and the settings for it."""

    paths: Mapping[str, Sequence[str]]
    """Part of the base (`unet`, `text_encoder`, …) → paths, inside that part, of the layers to adapt"""
    rank: int
    """Inner dimension of the factors"""
    alpha: float
    """Alpha; the scale of ΔW is alpha / rank"""
    seed: int
    """Seed of the initial values"""
    options: Any = None
    """Options of the method, an instance of its `Method.options`"""
    trigger: str = ""
    """Trigger word of the subject that is learned"""
    noun: str = ""
    """Class noun of the subject that is learned; empty if it has none"""


@dataclass(frozen=True)
class Method:
    """One way to parametrize an adapter; the docstring of this module has a template."""

    name: str
    summary: str
    """One line for ``diffgraft methods``"""
    attach: Callable[[Any, Spec], Attached]
    """``attach(target, spec)`` applies the method to a base, a pipeline, or any object with such attributes"""
    options: type[Options] = Options
    """Class of the method's options"""
    layers: str | Callable[[Any], str] = "attention"
    """Layers that are adapted if the recipe does not choose any: a key of `LAYERS`, or a function of the options"""
    unsupported: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = field(default_factory=dict)
    """Recipe keys that have no meaning for this method → the reason, or a function of the options that returns this
    mapping. A recipe that sets such a key is refused with the reason"""
    learns_token: bool = False
    """Whether the method learns the trigger word as a new token, with or without weights"""
    needs_conditions: bool = False
    """Whether it trains `Attached.control`, and so needs condition pictures, which the task `control` provides"""
    read: ReadDelta | None = None
    """Function of leaves by canonical name, and alpha, that builds the delta. Raises ValueError if they do not fit"""
    read_network: ReadNetwork | None = None
    """Function of tensors and settings that builds the network, for methods that train one. Raises ValueError if they
    do not fit"""

    def layers_under(self, options: Options) -> str:
        """Layers that are adapted with `options`, if the recipe does not choose any: a key of `LAYERS`."""
        return self.layers if isinstance(self.layers, str) else self.layers(options)

    def unsupported_under(self, options: Options) -> Mapping[str, str]:
        """Recipe keys that have no meaning for this method with `options` → the reason."""
        return self.unsupported(options) if callable(self.unsupported) else self.unsupported

    def read_options(self, values: Mapping[str, Any]) -> Options:
        """Validate the values of the recipe's `options` key, and convert them to their types.

        Raises:
            DiffgraftError: an option is unknown (the message names the nearest one), or its value is invalid.
        """
        if not isinstance(values, Mapping):
            raise DiffgraftError(
                f"Invalid value options={short_repr(values)}: expected names, as in options.NAME=VALUE."
            )
        values = self._nested({str(key): value for key, value in values.items()})
        unknown = [key for key in values if key not in self.options.model_fields]
        if unknown:
            known = [f"options.{key}" for key in self.options.model_fields]
            hint = did_you_mean(f"options.{unknown[0]}", known) if known else "the method has no options."
            raise DiffgraftError(f"The method {self.name!r} has no option {unknown[0]!r}: {hint}")
        for key, value in values.items():
            if isinstance(value, str) and get_origin(self.options.model_fields[key].annotation) is dict:
                raise DiffgraftError(
                    f"Invalid value options.{key}={short_repr(value)}: set its entries, as in options.{key}.NAME=VALUE."
                )
        parsed = {key: self._parse_list(key, value) for key, value in values.items()}
        return validated(self.options, parsed, "options")

    def _nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Nest dotted option names, as command lines have them: {"ranks.BASE": 4} becomes {"ranks": {"BASE": 4}}."""
        nested: dict[str, Any] = {}
        for key, value in values.items():
            name, dot, rest = key.partition(".")
            if dot and name in self.options.model_fields:
                previous = nested.get(name)
                nested[name] = {**(previous if isinstance(previous, Mapping) else {}), rest: value}
            else:
                nested[key] = value
        return nested

    def _parse_list(self, key: str, value: Any) -> Any:
        """Split the text "1,2,1" of a command line into a list, if the option is a list; return other values as is."""
        if get_origin(self.options.model_fields[key].annotation) is list and isinstance(value, str):
            return [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
        return value


def refuse(adapter: Adapter, *fields: str) -> None:
    """Raise ValueError if the adapter has contents in one of these fields: `deltas`, `networks`, `tokens`."""
    for name, contents in (("deltas", "weights of layers"), ("networks", "a network"), ("tokens", "a word")):
        if name in fields and getattr(adapter, name):
            raise ValueError(f"it holds {contents}, which this method cannot train")


def only_network(adapter: Adapter, kind: type[N]) -> N:
    """Return the only network of an adapter that holds nothing else, to start training from.

    Raises:
        ValueError: it holds something else.
    """
    refuse(adapter, "deltas", "tokens")
    network = adapter.networks[0] if len(adapter.networks) == 1 else None
    if isinstance(network, kind):
        return network
    kinds = ", ".join(own.kind for own in adapter.networks) or "none"
    raise ValueError(f"it holds {len(adapter.networks)} networks ({kinds}), but exactly one {kind.kind} is needed")


def strip_text_model(path: str) -> str:
    """Remove the level ``text_model``, which only some text encoders have, from a module path."""
    return path.replace(".text_model.", ".", 1)


def add_text_model(path: str) -> str:
    """Add the level ``text_model``, as files have it, to a path inside a CLIP text encoder.

    Modules behind the transformer, such as the text projection, never had that level.
    """
    is_inside = path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{path}" if is_inside else path
