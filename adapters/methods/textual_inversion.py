"""Textual inversion: a new word, and nothing else, learns (Gal et al. 2022, arXiv:2208.01618, section 3.2).

The word has one to n vectors in the table of each text encoder. They start as those of a word that comes near, and keep
the length they start with, so that the word does not drown out the others.
"""

from collections.abc import Mapping
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
    """What there is to set on a new word."""

    vectors: int = Field(1, ge=1, le=75)
    """Vectors of the word; each takes one of the 75 places of a prompt"""
    start: str = ""
    """Word or words whose vectors it starts with; unset: the recipe's `subject`, or the mean of all words"""
    keep_norm: bool = True
    """Keep the length of each vector at what it was at the start"""


class AttachedWord(Attached):
    """One new word in the live text encoders of a base."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: WordOptions = spec.options
        if not spec.trigger:
            raise DiffgraftError("Textual inversion needs a word to teach: set trigger=<something>.")
        self._word = spec.trigger
        start = self._options.start or spec.noun
        vectors = {
            part: _start(getattr(target, part), getattr(target, name), start, self._options.vectors)
            for part, name in tokenizers().items()
            if getattr(target, part, None) is not None
        }
        self._taught = AddedTokens(target, {self._word: vectors})
        self.rows = nn.ParameterDict(self._taught.rows)
        self._norms = {part: rows.detach().norm(dim=1, keepdim=True) for part, rows in self.rows.items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{part}.{self._word}": rows for part, rows in self.rows.items()}

    def paths(self) -> dict[str, str]:
        return {name: name for name in self.trainable()}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Its one word, whatever it is called there; its lengths are the ones that are kept."""
        refuse(adapter, "deltas", "networks")
        if len(adapter.tokens) != 1:
            raise ValueError(f"it holds {len(adapter.tokens)} words, of which one can train")
        (vectors,) = adapter.tokens.values()
        for part, rows in vectors.items():
            if part not in self.rows or rows.shape[1] != self.rows[part].shape[1]:
                raise ValueError(f"its word has vectors of width {rows.shape[1]} for {part}, for another kind of base")
            if len(rows) != len(self.rows[part]):
                here, there = len(self.rows[part]), len(rows)
                raise ValueError(f"its word has {there} vectors, and {here} train here: set options.vectors={there}")
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
        self._taught.remove()


@torch.no_grad()
def _start(encoder: Any, tokenizer: Any, words: str, count: int) -> Tensor:
    """`count` vectors [count, width] to begin with: those of `words`, over and over, or the mean of the table."""
    every = torch.arange(len(tokenizer), device=next(encoder.parameters()).device)
    table: Tensor = encoder.get_input_embeddings()(every).float()
    ids = tokenizer(words, add_special_tokens=False).input_ids
    rows = table[ids] if ids else table.mean(0, keepdim=True) / table.mean(0).norm() * table.norm(dim=1).median()
    return rows[torch.arange(count) % len(rows)].clone()


METHOD = Method(
    name="textual-inversion",
    summary="a new word learns, no weight: the smallest file, a few kilobytes",
    attach=AttachedWord,
    options=WordOptions,
    learns_token=True,
    unsupported={
        **NO_FACTORS,
        "layers": "it adapts no layer",
        "text_encoder": "it learns a row of the text encoder's table, and none of its weights",
        "prior": "what the base draws of the class does not change, as no weight does",
    },
)
