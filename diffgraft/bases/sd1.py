"""Stable Diffusion 1.x: one CLIP text encoder, its last hidden state for the cross-attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffgraft.bases.base import Base, Conditioning, Framing, inpainting
from diffgraft.bases.prediction import ddpm_parameterization
from diffgraft.diffusion.parameterizations import Parameterization


class StableDiffusion1:
    """The family of Stable Diffusion 1.x and of the embedded base."""

    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    in_single_files: Mapping[str, str] = {"text_encoder": "cond_stage_model.transformer.text_model."}

    def holds(self, pipe: Any) -> bool:
        """Its pipeline is one of its own, which other families share."""
        return type(pipe).__name__ in (self.pipeline_class, inpainting(self.pipeline_class))

    def condition(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:
        """Last hidden state [n, 77, width], or, of whole prompts, [n, 77 · pieces, width]."""
        ids = token_ids(base.tokenizer, prompts, whole).to(base.device)
        return Conditioning(base.text_encoder(ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2]).flatten(1, 2))

    def framing(self, frames: Sequence[Framing]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """This family is not told."""
        return {}

    def parameterization(self, scheduler: Any) -> Parameterization:
        """ε or v, on the schedule of DDPM."""
        return ddpm_parameterization(scheduler)

    def reaches(self, base: Base, part: str, path: str) -> bool:  # noqa: ARG002
        """All of the text encoder reaches the UNet."""
        return True


def lost_words(tokenizer: Any, prompt: str) -> str:
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
