"""Pivotal tuning: a new word and weights are trained together, and saved in one file (the word also in its own file).

The word learns what can be named, and the weights what words cannot express. (The name is from Roich et al. 2021,
arXiv:2106.05744; cloneofsimo's ``lora`` applied it to diffusion models.)
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import Attached, Method, Spec
from diffgraft.adapters.methods.textual_inversion import AttachedWord, WordOptions
from diffgraft.adapters.registry import get_method
from diffgraft.errors import DiffgraftError


class JointOptions(WordOptions):
    """Options of a word that is trained together with weights."""

    token_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of the word's embeddings"""


class PivotalOptions(JointOptions):
    """Options of the word, and of the method that trains the weights."""

    weights: str = "lora"
    """Method that trains the weights, on its default layers; a recipe's settings for that method do not apply"""
    weights_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method that trains the weights: {"dora": true}"""


class WeightsAndWord(Attached):
    """A new word and a method that trains weights, on the same live base."""

    def __init__(self, weights: Attached, target: Any, spec: Spec) -> None:
        """Add the word of `spec` to `target`, to which `weights` are attached; if that fails they are detached."""
        super().__init__()
        options: JointOptions = spec.options
        self.weights = weights
        try:
            self.word = AttachedWord(target, spec)
        except BaseException:
            self.weights.detach()
            raise
        self._word_lr_scale = options.token_lr_scale

    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.weights.trainable(), **{f"word.{name}": p for name, p in self.word.trainable().items()}}

    def lr_scales(self) -> dict[str, float]:
        return {**self.weights.lr_scales(), **{f"word.{name}": self._word_lr_scale for name in self.word.trainable()}}

    def paths(self) -> dict[str, str]:
        return {**self.weights.paths(), **{f"word.{name}": path for name, path in self.word.paths().items()}}

    def detach_modules(self, paths: Collection[str]) -> None:
        self.weights.detach_modules(paths)

    def load(self, adapter: Adapter) -> set[str]:
        """Start from weights, from a word, or from both."""
        weights_only, word_only = replace(adapter, tokens={}), replace(adapter, deltas={}, networks=())
        return (self.weights.load(weights_only) if adapter.deltas or adapter.networks else set()) | (
            self.word.load(word_only) if adapter.tokens else set()
        )

    def after_step(self) -> None:
        self.weights.after_step()
        self.word.after_step()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with super().disabled(), self.weights.disabled(), self.word.disabled():
            yield

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return replace(self.weights.adapter(metadata), tokens=self.word.adapter({}).tokens)

    def detach(self) -> None:
        self.word.detach()
        self.weights.detach()


def attach(target: Any, spec: Spec) -> Attached:
    options: PivotalOptions = spec.options
    method = get_method(options.weights)
    if method.learns_token:
        raise DiffgraftError(
            f"Invalid value options.weights={options.weights!r}: must be a method that trains weights, as lora."
        )
    weights = method.attach(target, replace(spec, options=method.read_options(options.weights_options)))
    return WeightsAndWord(weights, target, spec)


def _layers(options: PivotalOptions) -> str:
    method = get_method(options.weights)
    return method.layers_under(method.read_options(options.weights_options))


def _unsupported(options: PivotalOptions) -> Mapping[str, str]:
    method = get_method(options.weights)
    reasons = method.unsupported_under(method.read_options(options.weights_options))
    renamed = {key: reason.replace("options.", "options.weights_options.") for key, reason in reasons.items()}
    return {key: f"with options.weights={method.name}, {reason}" for key, reason in renamed.items()}


METHOD = Method(
    name="pivotal",
    summary="a new word and weights together; the word is also saved in its own file",
    attach=attach,
    options=PivotalOptions,
    learns_token=True,
    layers=_layers,
    unsupported=_unsupported,
)
