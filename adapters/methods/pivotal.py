"""Pivotal tuning: a new word and weights learn together, and go into one file (the word, into one beside it as well).

The word takes what is a matter of naming, the weights what no word can say (Roich et al. 2021, arXiv:2106.05744, is
where the name comes from; cloneofsimo's ``lora`` brought it to diffusion models).
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


class PivotalOptions(WordOptions):
    """What there is to set on the word, and which method takes the weights."""

    weights: str = "lora"
    """Method for the weights, on the layers it is made for; what a recipe has under its name does not come along"""
    weights_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that method: {"dora": true}"""
    token_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of the word's vectors"""


class AttachedPivotal(Attached):
    """A word and a method of weights, on one live base."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        options: PivotalOptions = spec.options
        if options.weights in ("pivotal", "textual-inversion"):
            raise DiffgraftError(
                f"options.weights={options.weights!r} has no weights: name a method that has, like lora."
            )
        method = get_method(options.weights)
        self.weights = method.attach(target, replace(spec, options=method.read_options(options.weights_options)))
        try:
            self.word = AttachedWord(target, spec)
        except BaseException:
            self.weights.detach()
            raise
        self._rate = options.token_lr_scale

    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.weights.trainable(), **{f"word.{name}": p for name, p in self.word.trainable().items()}}

    def rates(self) -> dict[str, float]:
        return {**self.weights.rates(), **{f"word.{name}": self._rate for name in self.word.trainable()}}

    def paths(self) -> dict[str, str]:
        return {**self.weights.paths(), **{f"word.{name}": path for name, path in self.word.paths().items()}}

    def detach_modules(self, paths: Collection[str]) -> None:
        self.weights.detach_modules(paths)

    def load(self, adapter: Adapter) -> set[str]:
        """Weights, a word, or both."""
        weights, word = replace(adapter, tokens={}), replace(adapter, deltas={}, networks=())
        return (self.weights.load(weights) if adapter.deltas or adapter.networks else set()) | (
            self.word.load(word) if adapter.tokens else set()
        )

    def after_step(self) -> None:
        self.weights.after_step()
        self.word.after_step()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with super().disabled(), self.weights.disabled():
            yield

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return replace(self.weights.adapter(metadata), tokens=self.word.adapter({}).tokens)

    def detach(self) -> None:
        self.word.detach()
        self.weights.detach()


def _layers(options: PivotalOptions) -> str:
    method = get_method(options.weights)
    return method.layers_under(method.read_options(options.weights_options))


def _unsupported(options: PivotalOptions) -> Mapping[str, str]:
    method = get_method(options.weights)
    reasons = method.unsupported_under(method.read_options(options.weights_options))
    said = {key: reason.replace("options.", "options.weights_options.") for key, reason in reasons.items()}
    return {key: f"with options.weights={method.name}, {reason}" for key, reason in said.items()}


METHOD = Method(
    name="pivotal",
    summary="a new word and weights together; the word is saved in a file of its own, too",
    attach=AttachedPivotal,
    options=PivotalOptions,
    learns_token=True,
    layers=_layers,
    unsupported=_unsupported,
)
