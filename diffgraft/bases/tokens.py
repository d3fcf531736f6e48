"""Prompts as token ids, cut or read in pieces."""

from collections.abc import Sequence
from typing import Any

import torch


def truncated_text(tokenizer: Any, prompt: str) -> str:
    """The end of `prompt` that does not fit into the tokenizer's length, empty where all of it fits."""
    read = tokenizer(prompt, verbose=False, return_offsets_mapping=True)
    last = tokenizer.model_max_length - 2
    if len(read.input_ids) <= tokenizer.model_max_length:
        return ""
    return prompt[read.offset_mapping[last][1] :].strip()


def token_ids(tokenizer: Any, prompts: Sequence[str], whole: bool = False) -> torch.Tensor:
    """Token ids [n, pieces, tokenizer.model_max_length], cut and padded as diffusers' pipelines do: one piece.

    If `whole`, what is too long goes on in further pieces, each with a beginning and an end of its own, as the webui
    reads prompts; shorter prompts are filled up with empty pieces.
    """
    texts, length = list(prompts), tokenizer.model_max_length
    if not whole:
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: torch.Tensor = batch.input_ids
        return ids.unsqueeze(1)
    inner = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    room = length - 2
    count = max(1, *(-(-len(own) // room) for own in inner))
    first, last = tokenizer("").input_ids[:2]
    pieces = [[first, *own[at * room : (at + 1) * room], last] for own in inner for at in range(count)]
    padded = [piece + [tokenizer.pad_token_id] * (length - len(piece)) for piece in pieces]
    return torch.tensor(padded).view(len(texts), count, length)
