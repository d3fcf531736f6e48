"""Token ids of prompts, truncated or in chunks."""

from collections.abc import Sequence
from typing import Any

import torch

from diffgraft.errors import DiffgraftError


def check_clip_skip(encoder: Any, clip_skip: int) -> None:
    """Raise DiffgraftError if a text encoder has fewer layers than `clip_skip`, which counts them from the last."""
    layers = encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise DiffgraftError(f"Invalid value clip_skip={clip_skip}: this base's text encoder has {layers} layers.")


def truncated_text(tokenizer: Any, prompt: str) -> str:
    """Return the end of `prompt` that exceeds the tokenizer's length; empty if all of it fits."""
    encoded = tokenizer(prompt, verbose=False, return_offsets_mapping=True)
    last = tokenizer.model_max_length - 2
    if len(encoded.input_ids) <= tokenizer.model_max_length:
        return ""
    return prompt[encoded.offset_mapping[last][1] :].strip()


def token_ids(tokenizer: Any, prompts: Sequence[str], all_chunks: bool = False) -> torch.Tensor:
    """Return token ids [n, chunks, length] of n prompts, padded to the tokenizer's length.

    Prompts are truncated to one chunk, as in diffusers' pipelines. If `all_chunks`, long prompts continue in further
    chunks, each with its own start and end token, as in the webui; shorter prompts are padded with empty chunks.
    """
    texts, length = list(prompts), tokenizer.model_max_length
    if not all_chunks:
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: torch.Tensor = batch.input_ids
        return ids.unsqueeze(1)
    contents = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    capacity = length - 2
    count = max(1, *(-(-len(content) // capacity) for content in contents))
    first, last = tokenizer("").input_ids[:2]
    chunks = [
        [first, *content[index * capacity : (index + 1) * capacity], last]
        for content in contents
        for index in range(count)
    ]
    padded = [chunk + [tokenizer.pad_token_id] * (length - len(chunk)) for chunk in chunks]
    return torch.tensor(padded).view(len(texts), count, length)
