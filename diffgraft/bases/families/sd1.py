"""Stable Diffusion 1.x: one CLIP text encoder, whose last hidden state is used for cross-attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffgraft.bases.base import Base
from diffgraft.bases.family import Conditioning, TextSlot
from diffgraft.bases.tokens import check_clip_skip, token_ids
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
        (states,), _ = self.text_states(base, [token_ids(base.tokenizer, prompts, whole).to(base.device)])
        return Conditioning(states.flatten(1, 2))

    def text_states(
        self, base: Base, ids: Sequence[Tensor], clip_skip: int = 1
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the last hidden state, or for `clip_skip` above 1 an earlier one with the final normalization."""
        (tokens,), encoder = ids, base.text_encoder
        states: Tensor
        if clip_skip == 1:
            states = encoder(tokens.flatten(0, 1))[0]
        else:
            check_clip_skip(encoder, clip_skip)
            earlier = encoder(tokens.flatten(0, 1), output_hidden_states=True).hidden_states[-clip_skip]
            states = getattr(encoder, "text_model", encoder).final_layer_norm(earlier)
        return [states.view(*tokens.shape[:2], *states.shape[1:])], {}


FAMILY = StableDiffusion1()
