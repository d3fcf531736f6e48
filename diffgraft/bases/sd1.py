"""Stable Diffusion 1.x: one CLIP text encoder, its last hidden state for the cross-attention."""

from collections.abc import Sequence

import torch

from diffgraft.bases.base import Base, Conditioning


class StableDiffusion1:
    """The family of Stable Diffusion 1.x and of the embedded base."""

    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"

    def condition(self, base: Base, prompts: Sequence[str], size: tuple[int, int]) -> Conditioning:  # noqa: ARG002
        """Last hidden state [n, 77, width]; the size is not told to this family."""
        return Conditioning(base.text_encoder(token_ids(base.tokenizer, prompts).to(base.device))[0])


def token_ids(tokenizer: object, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, tokenizer.model_max_length], cut and padded as diffusers' pipelines do."""
    length = tokenizer.model_max_length  # type: ignore[attr-defined]
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")  # type: ignore[operator]
    ids: torch.Tensor = batch.input_ids
    return ids
