"""Chunks of tokens: weighted text in the lengths that a text encoder reads at once, 75 tokens for CLIP.

webui cuts a long prompt after a comma if one is near (``tokenize_line`` of its ``sd_hijack_clip.py``), ComfyUI at words
(``SDTokenizer`` of its ``sd1_clip.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffgraft.generation.grammar.attention import Piece, Style

COMMA_REACH = 20
"""Tokens that webui moves to the next chunk at most, so that a chunk ends after a comma"""
_LONG_WORD = 8
"""Words of so many tokens are cut by ComfyUI where a chunk ends"""


@dataclass
class Chunk:
    """Tokens that are encoded together, without the start and the end token."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens that share one attention weight to the current chunk."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def split(self, at: int) -> "Chunk":
        """Keep the first `at` tokens, and return the others as a new chunk."""
        rest = Chunk(self.ids[at:], self.weights[at:])
        del self.ids[at:], self.weights[at:]
        return rest

    def padded(self, tokenizer: Any) -> tuple[list[int], list[float]]:
        """Return ids and weights with start, end and padding, each as many as the tokenizer's maximum length."""
        first, last = tokenizer("").input_ids[:2]
        room = tokenizer.model_max_length - len(self.ids) - 2
        ids = [first, *self.ids, last, *[tokenizer.pad_token_id] * room]
        return ids, [1.0, *self.weights, *[1.0] * (room + 1)]


def chunks_of(tokenizer: Any, pieces: Sequence[Piece], style: Style = "webui") -> list[Chunk]:
    """Return the chunks of a text, at least one.

    Args:
        tokenizer: tokenizer of a text encoder; words that adapters added are never cut.
        pieces: the text, by weight.
        style: program whose rules are followed.
    """
    return _webui(tokenizer, pieces) if style == "webui" else _comfyui(tokenizer, pieces)


def _webui(tokenizer: Any, pieces: Sequence[Piece]) -> list[Chunk]:
    length, comma = tokenizer.model_max_length - 2, tokenizer(",", add_special_tokens=False).input_ids
    chunks, comma_at = [Chunk()], -1
    for piece in pieces:
        if piece.is_break:
            chunks.append(Chunk())
            comma_at = -1
            continue
        for ids in _tokens(tokenizer, piece.text):
            now = chunks[-1]
            if ids == comma:
                comma_at = len(now.ids)
            elif len(now.ids) == length and comma_at >= max(0, length - COMMA_REACH):
                chunks.append(now.split(comma_at + 1))
                comma_at = -1
            if len(chunks[-1].ids) + len(ids) > length:
                chunks.append(Chunk())
                comma_at = -1
            for start in range(0, len(ids), length):  # a word of more tokens than a chunk has cannot stay whole
                if start:
                    chunks.append(Chunk())
                chunks[-1].add(ids[start : start + length], piece.weight)
    return chunks if chunks[-1].ids or len(chunks) == 1 else chunks[:-1]


def _comfyui(tokenizer: Any, pieces: Sequence[Piece]) -> list[Chunk]:
    length = tokenizer.model_max_length - 2
    chunks = [Chunk()]
    for piece in pieces:
        for word in piece.text.replace("\n", " ").split(" "):
            ids = [number for group in _tokens(tokenizer, word.removeprefix("embedding:")) for number in group]
            while len(ids) + len(chunks[-1].ids) > length:
                room = length - len(chunks[-1].ids) if len(ids) >= _LONG_WORD else 0
                chunks[-1].add(ids[:room], piece.weight)
                ids = ids[room:]
                chunks.append(Chunk())
            chunks[-1].add(ids, piece.weight)
    return chunks


def _tokens(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Yield the tokens of a text one by one; those of a word that was added to the tokenizer come together."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    added = tokenizer.added_tokens_decoder
    run: list[int] = []
    place = None
    for number, offset in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if run and (offset != place or number not in added):
            yield run
            run = []
        if number not in added or number in tokenizer.all_special_ids:
            yield [number]
            continue
        run, place = [*run, number], offset
    if run:
        yield run
