"""Stable Diffusion 2.x: OpenCLIP's text encoder in CLIP's place, its last layer left away in the file already."""

from typing import Any

from diffgraft.bases.families.sd1 import StableDiffusion1
from diffgraft.bases.family import TextSlot


class StableDiffusion2(StableDiffusion1):
    """The family of Stable Diffusion 2.x; some of it predict v (768 pixels), some ε (512)."""

    name = "sd2"
    text = (TextSlot("text_encoder", "tokenizer", "cond_stage_model.model."),)

    def matches(self, pipe: Any) -> bool:
        """Its pipeline is that of 1.x; the text encoder of OpenCLIP has the exact GELU."""
        config = getattr(pipe.text_encoder, "config", None)
        is_clip = type(pipe.text_encoder).__name__ != "BertModel"
        return self.has_pipeline(pipe) and is_clip and getattr(config, "hidden_act", "") == "gelu"


FAMILY = StableDiffusion2()
