"""Taiyi, the Chinese Stable Diffusion: BERT and its vocabulary in CLIP's place (IDEA-CCNL, arXiv:2209.02970)."""

from collections.abc import Mapping
from typing import Any

from diffgraft.bases.sd1 import StableDiffusion1


class Taiyi(StableDiffusion1):
    """The family of Taiyi-Stable-Diffusion-1B-Chinese."""

    name = "taiyi"
    in_single_files: Mapping[str, str] = {}

    def holds(self, pipe: Any) -> bool:
        """Its pipeline is that of 1.x; the text encoder is a BERT."""
        return super().holds(pipe) and type(pipe.text_encoder).__name__ == "BertModel"
