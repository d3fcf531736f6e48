"""Stable Diffusion 1.x: one CLIP text encoder, whose last hidden state is used for cross-attention."""

from collections.abc import Sequence
from typing import Any

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, TextSlot
from diffgraft.bases.tokens import token_ids
from diffgraft.bases.unet import UNetFamily


class StableDiffusion1(UNetFamily):
    """The family of Stable Diffusion 1.x and of the embedded base."""

    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    text = (TextSlot("text_encoder", "tokenizer", "cond_stage_model.transformer.text_model."),)

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the class of Stable Diffusion 1.x, as 2.x has, with CLIP's own text encoder."""
        config = getattr(pipe.text_encoder, "config", None)
        is_clip = type(pipe.text_encoder).__name__ != "BertModel"
        return self.has_pipeline(pipe) and is_clip and getattr(config, "hidden_act", "") != "gelu"

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:
        """Return the last hidden state [n, 77, width], or [n, 77 · chunks, width] if `whole`."""
        ids = token_ids(base.tokenizer, prompts, whole).to(base.device)
        return Conditioning(base.text_encoder(ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2]).flatten(1, 2))


FAMILY = StableDiffusion1()
