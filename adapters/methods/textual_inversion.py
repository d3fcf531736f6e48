"""Textual inversion: only a new word is trained (Gal et al. 2022, arXiv:2208.01618, section 3.2).

The word has one or more embeddings in the table of each text encoder. They start as those of similar words, and keep
the norm that they start with, so that the word does not dominate the others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Options, Spec, refuse
from diffgraft.adapters.words import AddedTokens
from diffgraft.bases.registry import tokenizers
from diffgraft.errors import DiffgraftError


class WordOptions(Options):
    """Options of a new word."""

    vectors: int = Field(1, ge=1, le=75)
    """Number of embeddings (tokens) of the word; each takes one of the 75 tokens of a prompt"""
    start: str = ""
    """Word or words to initialize the embeddings from; unset: the recipe's `subject`, or the mean of all words"""
    keep_norm: bool = True
    """Keep the norm of each embedding at its initial value"""


class AttachedWord(Attached):
    """A new word in the live text encoders of a base, which is trained."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: WordOptions = spec.options
        if not spec.trigger:
            raise DiffgraftError("Textual inversion needs a word to train: set trigger=<something>.")
        self._word = spec.trigger
        start = self._options.start or spec.noun
        vectors = {
            part: _initial_embeddings(getattr(target, part), getattr(target, name), start, self._options.vectors)
            for part, name in tokenizers().items()
            if getattr(target, part, None) is not None
        }
        self._tokens = AddedTokens(target, {self._word: vectors})
        self.rows = nn.ParameterDict(self._tokens.rows)
        self._initial = {part: rows.detach().clone() for part, rows in self.rows.items()}
        self._norms = {part: rows.norm(dim=1, keepdim=True) for part, rows in self._initial.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Give the word its initial embeddings within the block, so that prompts with it have a meaning to the base."""
        current = {part: rows.data for part, rows in self.rows.items()}
        with super().disabled():
            for part, rows in self.rows.items():
                rows.data = self._initial[part].to(rows)
            try:
                yield
            finally:
                for part, rows in self.rows.items():
                    rows.data = current[part]

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{part}.{self._word}": rows for part, rows in self.rows.items()}

    def paths(self) -> dict[str, str]:
        return {name: name for name in self.trainable()}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only word of `adapter`, whatever its name; the norms of its embeddings are kept."""
        refuse(adapter, "deltas", "networks")
        if len(adapter.tokens) != 1:
            raise ValueError(f"it holds {len(adapter.tokens)} words; only a single one can be trained")
        (vectors,) = adapter.tokens.values()
        for part, rows in vectors.items():
            if part not in self.rows or rows.shape[1] != self.rows[part].shape[1]:
                raise ValueError(
                    f"its embeddings for {part} have width {rows.shape[1]}: they are for another kind of base"
                )
            if len(rows) != len(self.rows[part]):
                count = len(rows)
                raise ValueError(
                    f"its word has {count} embeddings, but this run trains {len(self.rows[part])}: "
                    f"set options.vectors={count}"
                )
            self.rows[part].copy_(rows)
            self._norms[part] = self.rows[part].norm(dim=1, keepdim=True)
        return {f"{part}.{self._word}" for part in vectors}

    @torch.no_grad()
    def after_step(self) -> None:
        for part, rows in self.rows.items():
            if self._options.keep_norm and rows.requires_grad:
                rows.mul_(self._norms[part] / rows.norm(dim=1, keepdim=True))

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        vectors = {part: rows.detach().float().cpu().clone() for part, rows in self.rows.items()}
        return Adapter({}, metadata, tokens={self._word: vectors})

    def detach(self) -> None:
        self._tokens.remove()


@torch.no_grad()
def _initial_embeddings(encoder: Any, tokenizer: Any, words: str, count: int) -> Tensor:
    """Initial embeddings [count, width]: those of `words`, repeated as needed, or the mean of the table."""
    ids_of_all = torch.arange(len(tokenizer), device=next(encoder.parameters()).device)
    table: Tensor = encoder.get_input_embeddings()(ids_of_all).float()
    ids = tokenizer(words, add_special_tokens=False).input_ids
    rows = table[ids] if ids else table.mean(0, keepdim=True) / table.mean(0).norm() * table.norm(dim=1).median()
    return rows[torch.arange(count) % len(rows)].clone()


METHOD = Method(
    name="textual-inversion",
    summary="only a new word is trained, no weight: the smallest file, a few kilobytes",
    attach=AttachedWord,
    options=WordOptions,
    learns_token=True,
    unsupported={
        **NO_FACTORS,
        "layers": "it adapts no layer",
        "text_encoder": "it trains a row of the text encoder's embedding table, and none of its weights",
        "prior": "no weight changes, so the base's pictures of the class stay the same",
    },
)
