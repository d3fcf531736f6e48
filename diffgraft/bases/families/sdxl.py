"""Stable Diffusion XL: two text encoders, a pooled embedding, and micro-conditioning by size and crop."""

from collections.abc import Sequence
from typing import Any

import torch

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, SizeConditioning, TextSlot
from diffgraft.bases.tokens import check_clip_skip, token_ids
from diffgraft.bases.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """The family of Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2)."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    components = {  # noqa: RUF012
        **UNetFamily.components,
        "text_encoder_2": Component("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": UNetFamily.components["tokenizer"],
    }
    text = (
        TextSlot("text_encoder", "tokenizer", "conditioner.embedders.0.transformer.text_model."),
        TextSlot("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model."),
    )

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has SDXL's class, which no other family has."""
        return self.has_pipeline(pipe)

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:
        """Return the penultimate hidden states of both encoders, concatenated, and the second one's pooled embedding.

        The pooled embedding is that of the first chunk of a prompt.
        """
        tokenizers = (base.tokenizer, base.tokenizer_2)
        ids = [token_ids(tokenizer, prompts, whole).to(base.device) for tokenizer in tokenizers]
        states, added = self.text_states(base, ids)
        return Conditioning(torch.cat([state.flatten(1, 2) for state in states], -1), added)

    def text_states(
        self, base: Base, ids: Sequence[torch.Tensor], clip_skip: int = 1
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return hidden states without the final normalization, and the second encoder's pooled embedding.

        They are the penultimate ones for `clip_skip` 1 and 2.
        """
        states, pooled = [], None
        for tokens, encoder in zip(ids, (base.text_encoder, base.text_encoder_2), strict=True):
            check_clip_skip(encoder, clip_skip)
            out = encoder(tokens.flatten(0, 1), output_hidden_states=True)
            states.append(out.hidden_states[-max(clip_skip, 2)].unflatten(0, tokens.shape[:2]))
            pooled = out[0].unflatten(0, tokens.shape[:2])[:, 0]
        assert pooled is not None
        return states, {"text_embeds": pooled}

    def size_conditioning(self, frames: Sequence[SizeConditioning]) -> dict[str, torch.Tensor]:
        """Return ``time_ids`` [n, 6]: original size, crop corner and target size; float32, as float16 rounds them."""
        return {"time_ids": torch.tensor([[*frame.original, *frame.corner, *frame.target] for frame in frames]).float()}

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the denoiser: the last layer and the final norm of the first encoder do not.

        Only the hidden states before its last layer are used.
        """
        last = base.text_encoder.config.num_hidden_layers - 1
        is_after = f"encoder.layers.{last}." in path or path.endswith("final_layer_norm")
        return not (part == "text_encoder" and is_after)


FAMILY = StableDiffusionXL()
