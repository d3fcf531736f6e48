"""Stable Diffusion 2.x: OpenCLIP's text encoder in CLIP's place, its last layer left away in the file already."""

from collections.abc import Mapping
from typing import Any

from diffgraft.bases.sd1 import StableDiffusion1


class StableDiffusion2(StableDiffusion1):
    """The family of Stable Diffusion 2.x; some of it predict v (768 pixels), some ε (512)."""

    name = "sd2"
    in_single_files: Mapping[str, str] = {"text_encoder": "cond_stage_model.model."}

    def holds(self, pipe: Any) -> bool:
        """Its pipeline is that of 1.x; the text encoder of OpenCLIP has the exact GELU."""
        return super().holds(pipe) and getattr(pipe.text_encoder.config, "hidden_act", "") == "gelu"
