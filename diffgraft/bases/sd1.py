"""Stable Diffusion 1.x: one CLIP text encoder, its last hidden state for the cross-attention."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffgraft.bases.base import Base, Conditioning, inpainting


class StableDiffusion1:
    """The family of Stable Diffusion 1.x and of the embedded base."""

    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    in_single_files: Mapping[str, str] = {"text_encoder": "cond_stage_model.transformer.text_model."}

    def holds(self, pipe: Any) -> bool:
        """Its pipeline is one of its own, which other families share."""
        return type(pipe).__name__ in (self.pipeline_class, inpainting(self.pipeline_class))

    def condition(self, base: Base, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:  # noqa: ARG002
        """Last hidden state [n, 77, width]; the size is not told to this family."""
        return Conditioning(base.text_encoder(token_ids(base.tokenizer, prompts).to(base.device))[0])

    def reaches(self, base: Base, part: str, path: str) -> bool:  # noqa: ARG002
        """All of the text encoder reaches the UNet."""
        return True


def lost_words(tokenizer: Any, prompt: str) -> str:
    """The end of `prompt` that does not fit into the tokenizer's length, empty where all of it fits."""
    ids = tokenizer(prompt).input_ids
    lost: str = (
        tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]) if len(ids) > tokenizer.model_max_length else ""
    )
    return lost


def all_vectors(tokenizer: Any, prompt: str) -> str:
    """`prompt` with every word of several vectors written out, as diffusers does: ``<dog>`` → ``<dog> <dog>_1``."""
    added = tokenizer.added_tokens_encoder
    for word in set(tokenizer.tokenize(prompt)) & set(added):
        more = itertools.takewhile(lambda name: name in added, (f"{word}_{n}" for n in itertools.count(1)))
        prompt = prompt.replace(word, " ".join([word, *more]))
    return prompt


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, tokenizer.model_max_length], cut and padded as diffusers' pipelines do."""
    length = tokenizer.model_max_length
    batch = tokenizer(
        [all_vectors(tokenizer, prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = batch.input_ids
    return ids
