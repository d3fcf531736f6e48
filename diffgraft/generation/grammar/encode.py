"""Prompts with weights, encoded as webui or ComfyUI encodes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.bases.family import Conditioning
from diffgraft.errors import DiffgraftError
from diffgraft.generation.checks import check_fields
from diffgraft.generation.grammar.attention import Piece, Style, read_weights
from diffgraft.generation.grammar.chunks import Chunk, chunks_of

Emphasis = Literal["original", "no-norm", "ignore", "none"]
"""How webui applies weights: with the mean restored, without, not at all, or not even read"""
EMPHASES: tuple[Emphasis, ...] = ("original", "no-norm", "ignore", "none")


@dataclass(frozen=True)
class Encoding:
    """Settings of the prompt's grammar and of its encoding into text states."""

    style: Style = "webui"
    """Program whose grammar, chunks and weights are used"""
    emphasis: Emphasis = "original"
    """How weights are applied in the style of webui"""
    clip_skip: int = 1
    """Layer of the text encoder whose output is used, counted from the last, which is 1; SDXL uses at least 2"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for an emphasis or a layer that does not exist."""
        check_fields(self, ("style", "emphasis", "clip_skip"))
        if self.emphasis not in EMPHASES:
            raise DiffgraftError(f"Invalid value emphasis={self.emphasis!r}: must be one of {', '.join(EMPHASES)}.")
        if self.clip_skip < 1:
            raise DiffgraftError(f"Invalid value clip_skip={self.clip_skip}: must be at least 1, the last layer.")

    def pieces(self, text: str) -> list[Piece]:
        """Return a text in pieces of one weight."""
        if self.style == "webui" and self.emphasis == "none":
            return [Piece(text, 1.0)]
        return read_weights(text, self.style)


@torch.no_grad()
def encode_texts(base: Base, texts: Sequence[str], encoding: Encoding) -> Conditioning:
    """Encode texts with weights to hidden states [n, 77 · chunks, width]; shorter texts get empty chunks.

    With the emphasis `original` all texts together keep the mean of their hidden states, chunk by chunk, as in webui:
    encode the texts of one prompt's steps together, and different prompts apart.

    Args:
        base: base whose tokenizers and text encoders are used.
        texts: n texts without tags and changes between steps.
        encoding: how they are read and encoded.

    Returns:
        Hidden states, and the pooled embedding of the first chunk for families that use one.

    Raises:
        DiffgraftError: the family's text encoder has no weights of words, or too few layers for `clip_skip`.
    """
    pieces = [encoding.pieces(text) for text in texts]
    if not base.family.has_token_weights:
        if encoding.clip_skip > 1:
            raise DiffgraftError(f"clip_skip has no meaning for bases of the family {base.family.name}: leave it out.")
        if all(row == [Piece(row[0].text, 1.0)] for row in pieces):
            return base.family.encode(base, [row[0].text for row in pieces], True)
        base.family.text_states(base, [])  # says that there are none
    tokenizers = list(base.tokenizers().values())
    chunked = [[chunks_of(tokenizer, row, encoding.style) for row in pieces] for tokenizer in tokenizers]
    count = max(len(row) for rows in chunked for row in rows)
    ids, weights = [], []
    for tokenizer, rows in zip(tokenizers, chunked, strict=True):
        filled = [[*row, *[Chunk()] * (count - len(row))] for row in rows]
        padded = [[chunk.padded(tokenizer) for chunk in row] for row in filled]
        ids.append(torch.tensor([[chunk[0] for chunk in row] for row in padded], device=base.device))
        weights.append(torch.tensor([[chunk[1] for chunk in row] for row in padded], device=base.device))
    states, added = base.family.text_states(base, ids, encoding.clip_skip)
    if encoding.style == "comfyui":
        blank = [torch.tensor([[Chunk().padded(item)[0]]], device=base.device) for item in tokenizers]
        empty, _ = base.family.text_states(base, blank, encoding.clip_skip)
        weighed = [
            (state + (weight.unsqueeze(-1).to(state.device) - 1) * (state - nothing)).to(state.dtype)
            for state, weight, nothing in zip(states, weights, empty, strict=True)
        ]
    else:
        weigh = _WEBUI[encoding.emphasis]
        weighed = [
            weigh(state, weight.unsqueeze(-1).to(state.device)).to(state.dtype)
            for state, weight in zip(states, weights, strict=True)
        ]
    return Conditioning(torch.cat(weighed, -1).flatten(1, 2), added)


def _with_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply, then restore the mean of each chunk over all texts; webui's `Original`."""
    scaled = states * weights
    # in float64, as means near zero would lose their digits; not all devices have it
    before, after = (values.cpu().double().mean((0, 2, 3), keepdim=True) for values in (states, scaled))
    return scaled * (before / after).to(states)


_WEBUI: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "original": _with_mean,
    "no-norm": lambda states, weights: states * weights,
    "ignore": lambda states, _: states,
    "none": lambda states, _: states,
}
"""Emphasis → function of hidden states [n, chunks, 77, width] and weights [n, chunks, 77, 1]"""
