"""Whether a CLIP tokenizer's vocabulary and merges are whole: cut short, they give every prompt other tokens silently.

A vocabulary of byte pairs (Sennrich et al. 2016, arXiv:1508.07909) has one token for each byte, with and without the
end of a word, and one for each merge; CLIP's has 2 · 256 + 48,894, and two for the ends of a text.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

_ROWS = 49_408
"""Rows in the table of CLIP's text encoders"""
_ALIKE = 0.9
"""Share of a vocabulary that CLIP's has, too, from which it is meant to be CLIP's"""
_END = "</w>"

Parts = tuple[dict[str, int], list[tuple[str, str]]]
"""Token → id, and pairs of tokens in the order in which they are joined"""


def check_vocabulary(tokenizer: Any, rows: int, clip: Path) -> None:
    """Refuse a vocabulary of byte pairs that does not fit its merges, or a part of CLIP's beside a whole table.

    Args:
        tokenizer: one of transformers', of any kind; those without byte pairs pass.
        rows: tokens that the table of the text encoder has.
        clip: folder of CLIP's own tokenizer.

    Raises:
        ValueError: something is missing, or stands in another order.
    """
    numbers = tokenizer.get_vocab().values()
    if len(set(numbers)) < len(numbers):
        raise ValueError("several words of vocab.json have the same number")
    if (highest := max(numbers, default=0)) >= rows:  # writing it out would take as many steps
        raise ValueError(
            f"it has more words than the table of the text encoder, numbered up to {highest:,} for {rows:,} rows"
        )
    found = _parts(tokenizer)
    if found is None:
        return
    vocabulary, merges = found
    known = {first + second for first, second in merges} | set(tokenizer.added_tokens_encoder)
    lone = [word for word in vocabulary if len(word.removesuffix(_END)) > 1 and word not in known]
    if lone:
        raise ValueError(f"merges.txt never makes {len(lone):,} of the words in vocab.json, such as {lone[0]!r}")
    words, pairs = _clip(clip)
    if rows == _ROWS and len(vocabulary.keys() & words.keys()) > _ALIKE * len(vocabulary):
        if lacking := [word for word in words if vocabulary.get(word) != words[word]]:
            raise ValueError(
                f"{len(lacking):,} of CLIP's words are missing or numbered otherwise, such as {lacking[0]!r}"
            )
        if merges[: len(pairs)] != pairs:
            raise ValueError("merges.txt has CLIP's pairs in another order, or not all of them")


@cache
def _clip(folder: Path) -> Parts:
    from transformers import CLIPTokenizer

    found = _parts(CLIPTokenizer.from_pretrained(folder))
    assert found is not None
    return found


def _parts(tokenizer: Any) -> Parts | None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        return None
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return model["vocab"], [(first, second) for first, second in pairs]
