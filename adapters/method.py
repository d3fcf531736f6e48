"""The contract of a method, with a template for a new one.

A new method is one module of `diffgraft.adapters.methods`, or of an outside package that names it in the entry-point
group ``diffgraft.methods``. A method that adds a matrix ΔW says only how ΔW is made of its leaves; the live layer, the
delta in memory, saving and loading are in `factors.py` and `patch.py`::

    class Rows(Factors):                                     # one number for each output, added to its whole row
        kind = "rows"

        def start(self, shape, rank, generator):             # [out, in] or [out, in / groups, h, w] → leaves, ΔW = 0
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

Who calls what, and when:

- `Method.read_options` and `Method.unsupported` when a recipe is read; the latter names keys that mean nothing here.
- `Method.attach` when a run starts. It gets the live base and a `Spec`, and returns an `Attached`.
- `Attached.trainable`, `rates` and `paths` once, to build the optimizer; `after_step` after each of its steps.
- `Attached.adapter` for checkpoints, samples and the final file: float32 tensors on the CPU.
- `Method.read` or `Method.read_network` for each module of an adapter file that is of this kind.
- A `Delta` that is not ``ΔW + W`` overrides `Delta.apply`: weight [out, in, …] and bias [out] in, the same shapes out.

Everything else (formats, merging, stacking, converting, the tests' matrices) finds it through
`diffgraft.adapters.registry`. The command ``diffgraft methods`` lists methods without importing torch, so `name` and
`summary` are literals, given by keyword.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Delta, Network
from diffgraft.bases.layers import is_of_text
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr

ReadDelta = Callable[[Mapping[str, Tensor], float | None], Delta]
ReadNetwork = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Network]
NO_FACTORS = dict.fromkeys(("rank", "alpha"), "it has no low-rank factors")
"""`Method.unsupported` of methods that are not made of factors."""


class Options(BaseModel):
    """The options of a method (`options.NAME=VALUE` in a recipe); a method with options of its own subclasses it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Attached(nn.Module):
    """A method applied to a live base: it changes what the base computes, and its parameters are trained."""

    is_disabled = False
    """Whether it is switched off for now, within `disabled`"""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, always in the same order."""

    @abstractmethod
    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        """The current values as an `Adapter` with this metadata: copies, in float32 on the CPU."""

    def load(self, adapter: Adapter) -> set[str]:  # noqa: ARG002  (others need it)
        """Start from the values, ranks and scales of `adapter`.

        Returns:
            The paths, as in `paths`, of the modules that `adapter` has weights for; the others keep their initial
            values.

        Raises:
            ValueError: `adapter` holds something that this method cannot train, or does not fit the base. This object
                must not be used any more then.
        """
        raise ValueError("this method cannot start from a file")

    @abstractmethod
    def detach(self) -> None:
        """Remove the method from the base, which then has its original parameters, bit for bit."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the method off within the block; added tokens stay, for prompts that contain them."""
        self.is_disabled = True
        try:
            yield
        finally:
            self.is_disabled = False

    def rates(self) -> dict[str, float]:
        """Learning-rate scale by the name of the parameter; parameters without one have a scale of 1."""
        return {}

    def paths(self) -> dict[str, str]:
        """Name of each trainable parameter → path of its module, as in `Adapter.deltas`."""
        return {name: strip_text_model(name.rpartition(".")[0]) for name in self.trainable()}

    def detach_modules(self, paths: Collection[str]) -> None:
        """Remove the method from the modules at `paths` only, so that they are not trained; other methods ignore it."""

    def after_step(self) -> None:
        """Called after each optimizer step, for example to rescale parameters."""

    @property
    def affects_text_encoder(self) -> bool:
        """Whether it changes the outputs of text encoders: it adapts their modules, or adds tokens."""
        return any(is_of_text(path) for path in self.paths().values())

    @property
    def trains_text(self) -> bool:
        """Whether the outputs of text encoders still change during training."""
        paths, trained = self.paths(), self.trainable()
        return any(value.requires_grad and is_of_text(paths[name]) for name, value in trained.items())


@dataclass(frozen=True)
class Spec:
    """What `Method.attach` applies to a base."""

    paths: Mapping[str, Sequence[str]]
    """Part of the base (`unet`, `text_encoder`, …) → paths inside it of the layers that are adapted"""
    rank: int
    """Inner dimension of the factors"""
    alpha: float
    """The scale is alpha / rank"""
    seed: int
    """Seed of the initial values"""
    options: Any = None
    """The method's own settings, an instance of its `Method.options`"""
    trigger: str = ""
    """The trigger word of what is learned"""
    noun: str = ""
    """The class noun of what is learned; empty where there is none"""


@dataclass(frozen=True)
class Method:
    """One way to parametrize an adapter; the module's docstring has a template."""

    name: str
    summary: str
    """One line for ``diffgraft methods``."""
    attach: Callable[[Any, Spec], Attached]
    """``attach(target, spec)`` applies it to a base, a pipeline, or anything with such components as attributes."""
    options: type[Options] = Options
    """The class of its options."""
    layers: str | Callable[[Any], str] = "attention"
    """The layers it adapts where the recipe does not choose any: a key of `LAYERS`, or a function of the options."""
    unsupported: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = field(default_factory=dict)
    """Recipe keys that have no meaning for this method → the reason, or a function of the options that returns them. A
    recipe that sets one is refused with the reason."""
    learns_token: bool = False
    """Whether it learns the trigger word as a new token, with or without weights"""
    read: ReadDelta | None = None
    """Leaves by their canonical names, and alpha → the delta. Raises ValueError where they do not fit together."""
    read_network: ReadNetwork | None = None
    """Tensors and settings → the network, for methods that train one. Raises ValueError where they do not fit."""

    def layers_under(self, options: Options) -> str:
        """The layers it adapts under `options`, where the recipe does not choose any."""
        return self.layers if isinstance(self.layers, str) else self.layers(options)

    def unsupported_under(self, options: Options) -> Mapping[str, str]:
        """Recipe keys that have no meaning for this method under `options` → the reason."""
        return self.unsupported(options) if callable(self.unsupported) else self.unsupported

    def read_options(self, given: Mapping[str, Any]) -> Options:
        """The options `given`, validated and with their types.

        Raises:
            DiffgraftError: an option is unknown (the message names the nearest one), or its value is invalid.
        """
        if not isinstance(given, Mapping):
            raise DiffgraftError(
                f"Invalid value options={short_repr(given)}: options have names, as options.NAME=VALUE."
            )
        given = self._laid_out({str(key): value for key, value in given.items()})
        unknown = [key for key in given if key not in self.options.model_fields]
        if unknown:
            known = [f"options.{key}" for key in self.options.model_fields]
            hint = did_you_mean(f"options.{unknown[0]}", known) if known else "it has none."
            raise DiffgraftError(f"The method {self.name!r} has no option {unknown[0]!r}: {hint}")
        try:
            return self.options.model_validate({key: self._parsed(key, value) for key, value in given.items()})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DiffgraftError(
                f"Invalid value options.{key}={short_repr(first['input'])}: {first['msg'].lower()}."
            ) from error

    def _laid_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``{"ranks.BASE": 4}``, as a command line gives it inside other options, as ``{"ranks": {"BASE": 4}}``."""
        found: dict[str, Any] = {}
        for key, value in given.items():
            name, dot, rest = key.partition(".")
            if dot and name in self.options.model_fields:
                held = found.get(name)
                found[name] = {**(held if isinstance(held, Mapping) else {}), rest: value}
            else:
                found[key] = value
        return found

    def _parsed(self, key: str, value: Any) -> Any:
        """Text for a list, as a command line gives it (1,2,1), as a list; other values as they are."""
        if get_origin(self.options.model_fields[key].annotation) is list and isinstance(value, str):
            return [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
        return value


def refuse(adapter: Adapter, *others: str) -> None:
    """Raises ValueError where an adapter holds something under one of these fields: deltas, networks, tokens."""
    for field_, what in (("deltas", "weights of layers"), ("networks", "a network"), ("tokens", "a word")):
        if field_ in others and getattr(adapter, field_):
            raise ValueError(f"it holds {what}, for which this method has no place")


def strip_text_model(path: str) -> str:
    """A path without the level ``text_model``, which only some text encoders have."""
    return path.replace(".text_model.", ".", 1)


def add_text_model(inside: str) -> str:
    """A path inside a CLIP text encoder with that level, as files have it; the projection behind it never had it."""
    within = inside.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{inside}" if within else inside
