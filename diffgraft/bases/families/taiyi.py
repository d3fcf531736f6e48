"""Taiyi, the Chinese Stable Diffusion, with BERT instead of CLIP as text encoder (IDEA-CCNL, arXiv:2209.02970)."""

from typing import Any

from diffgraft.bases.families.sd1 import StableDiffusion1
from diffgraft.bases.family import TextSlot


class Taiyi(StableDiffusion1):
    """The family of Taiyi-Stable-Diffusion-1B-Chinese."""

    name = "taiyi"
    text = (TextSlot("text_encoder", "tokenizer"),)

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the class of Stable Diffusion 1.x, with a BERT as its text encoder."""
        return self.has_pipeline(pipe) and type(pipe.text_encoder).__name__ == "BertModel"


FAMILY = Taiyi()
