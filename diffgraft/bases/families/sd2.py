"""Stable Diffusion 2.x: OpenCLIP's text encoder, whose last layer its diffusers folder leaves out."""

from typing import Any

from diffgraft.bases.families.sd1 import StableDiffusion1
from diffgraft.bases.family import TextSlot


class StableDiffusion2(StableDiffusion1):
    """The family of Stable Diffusion 2.x; its models for 768 pixels predict v, those for 512 predict ε."""

    name = "sd2"
    text = (TextSlot("text_encoder", "tokenizer", "cond_stage_model.model."),)

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the class of Stable Diffusion 1.x, with OpenCLIP's text encoder (exact GELU)."""
        config = getattr(pipe.text_encoder, "config", None)
        is_clip = type(pipe.text_encoder).__name__ != "BertModel"
        return self.has_pipeline(pipe) and is_clip and getattr(config, "hidden_act", "") == "gelu"


FAMILY = StableDiffusion2()
