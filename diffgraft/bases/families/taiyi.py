"""Taiyi, the Chinese Stable Diffusion, with BERT instead of CLIP as text encoder (IDEA-CCNL, arXiv:2209.02970)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffgraft.bases.base import Base
from diffgraft.bases.families.sd1 import StableDiffusion1
from diffgraft.bases.family import TextSlot
from diffgraft.errors import DiffgraftError


class Taiyi(StableDiffusion1):
    """The family of Taiyi-Stable-Diffusion-1B-Chinese."""

    name = "taiyi"
    text = (TextSlot("text_encoder", "tokenizer"),)

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the class of Stable Diffusion 1.x, with a BERT as its text encoder."""
        return self.has_pipeline(pipe) and type(pipe.text_encoder).__name__ == "BertModel"

    def text_states(
        self, base: Base, ids: Sequence[Tensor], clip_skip: int = 1
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the last hidden state; other layers of BERT are of no use to the denoiser."""
        if clip_skip != 1:
            raise DiffgraftError(f"Invalid value clip_skip={clip_skip}: bases with BERT use its last layer, 1.")
        return super().text_states(base, ids)


FAMILY = Taiyi()
