"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size and crop."""

from collections.abc import Sequence
from typing import Any

import torch

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, SizeConditioning, TextSlot
from diffgraft.bases.tokens import token_ids
from diffgraft.bases.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """The family of Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2)."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    text = (
        TextSlot("text_encoder", "tokenizer", "conditioner.embedders.0.transformer.text_model."),
        TextSlot("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model."),
    )

    def matches(self, pipe: Any) -> bool:
        """Its pipeline is one of its own."""
        return self.has_pipeline(pipe)

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:
        """Penultimate hidden states of both encoders side by side; pooled embedding of the second, first piece."""
        states, pooled = [], None
        for tokenizer, encoder in ((base.tokenizer, base.text_encoder), (base.tokenizer_2, base.text_encoder_2)):
            ids = token_ids(tokenizer, prompts, whole).to(base.device)
            out = encoder(ids.flatten(0, 1), output_hidden_states=True)
            states.append(out.hidden_states[-2].unflatten(0, ids.shape[:2]).flatten(1, 2))
            pooled = out[0].unflatten(0, ids.shape[:2])[:, 0]
        assert pooled is not None
        return Conditioning(torch.cat(states, -1), {"text_embeds": pooled})

    def size_conditioning(self, frames: Sequence[SizeConditioning]) -> dict[str, torch.Tensor]:
        """Original size, corner of what is shown, and its size; in float32, as larger numbers need it."""
        return {"time_ids": torch.tensor([[*one.original, *one.corner, *one.shown] for one in frames]).float()}

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """The end of the first encoder does not: of it the states before its last layer are used alone."""
        last = base.text_encoder.config.num_hidden_layers - 1
        behind = f"encoder.layers.{last}." in path or path.endswith("final_layer_norm")
        return not (part == "text_encoder" and behind)


FAMILY = StableDiffusionXL()
