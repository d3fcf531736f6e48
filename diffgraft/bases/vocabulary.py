"""Checks that a tokenizer's vocabulary and merges are complete; damaged ones would silently change all tokens.

A vocabulary of byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) has a token for each byte, with and without
the end of a word, and one for each merge; CLIP's has 2 · 256 + 48,894 tokens, and two for start and end of a text.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

_ROWS = 49_408
"""Rows in the embedding table of CLIP's text encoders"""
_CLIP_SHARE = 0.9
"""Share of its tokens that a vocabulary must have in common with CLIP's to be taken for CLIP's"""
_END = "</w>"

_checked: set[tuple[str, int]] = set()
"""SHA-256 of tokenizers that passed, and rows of their text encoders: the check takes a second"""
Merges = list[tuple[str, str]]
"""Pairs of tokens in the order in which they are merged"""
Parts = tuple[dict[str, int], Merges]
"""Token → id, and merges"""


def check_vocabulary(tokenizer: Any, rows: int, clip: Path) -> None:
    """Check that a byte-pair vocabulary fits its merges and the text encoder, and that CLIP's is complete.

    Args:
        tokenizer: a tokenizer of transformers; those without byte-pair encoding pass.
        rows: rows of the text encoder's embedding table.
        clip: folder of CLIP's own tokenizer.

    Raises:
        ValueError: tokens or merges are missing, duplicated, or in another order.
    """
    numbers = tokenizer.get_vocab().values()
    if len(set(numbers)) < len(numbers):
        raise ValueError("several tokens of vocab.json have the same id")
    if (highest := max(numbers, default=0)) >= rows:  # tokenizers would list all ids up to it
        raise ValueError(f"its ids go up to {highest:,}, but the embedding table of the text encoder has {rows:,} rows")
    text = tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(text.encode()).hexdigest(), rows
    if key not in _checked:
        parts = _vocabulary_and_merges(text)
        if parts is not None:
            _check_parts(tokenizer, *parts, rows, clip)
        _checked.add(key)


def _check_parts(tokenizer: Any, vocabulary: dict[str, int], merges: Merges, rows: int, clip: Path) -> None:
    known = {first + second for first, second in merges} | set(tokenizer.added_tokens_encoder)
    orphans = [word for word in vocabulary if len(word.removesuffix(_END)) > 1 and word not in known]
    if orphans:
        raise ValueError(f"merges.txt lacks {len(orphans):,} of the tokens in vocab.json, such as {orphans[0]!r}")
    words, pairs = _clip(clip)
    if rows == _ROWS and len(vocabulary.keys() & words.keys()) > _CLIP_SHARE * len(vocabulary):
        if missing := [word for word in words if vocabulary.get(word) != words[word]]:
            raise ValueError(f"{len(missing):,} of CLIP's tokens are missing or have other ids, such as {missing[0]!r}")
        if merges[: len(pairs)] != pairs:
            raise ValueError(
                "merges.txt lacks some of CLIP's merges, or has them in another order; use CLIP's original file"
            )


@cache
def _clip(folder: Path) -> Parts:
    from transformers import CLIPTokenizer

    parts = _vocabulary_and_merges(CLIPTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    assert parts is not None
    return parts


def _vocabulary_and_merges(text: str) -> Parts | None:
    """Return the parts of a tokenizer, in the JSON of the package tokenizers; None without byte-pair encoding."""
    model = json.loads(text)["model"]
    if model.get("type") != "BPE":
        return None
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return model["vocab"], [(first, second) for first, second in pairs]
