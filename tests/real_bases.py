"""Flow-matching bases in their published configurations, without weights."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.initialization import no_init_weights

from diffgraft.bases import Base
from diffgraft.bases.registry import families
from tests.flow_bases import qwen_tokenizer

Parts = dict[str, Any]


def _qwen3_4b() -> Qwen3Config:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    return Qwen3Config(**heads, **sizes, tie_word_embeddings=True)


def _flux2_klein() -> Parts:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        "vae": diffusers.AutoencoderKLFlux2(),
        "text_encoder": Qwen3ForCausalLM(_qwen3_4b()),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _zimage() -> Parts:
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return {
        "transformer": diffusers.ZImageTransformer2DModel(),
        "vae": diffusers.AutoencoderKL(
            latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2, **sides
        ),
        "text_encoder": Qwen3Model(_qwen3_4b()),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


def _qwen_image() -> Parts:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": rope}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064, **heads}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(),
        "vae": diffusers.AutoencoderKLQwenImage(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


REAL: Mapping[str, Callable[[], Parts]] = {
    "flux2-klein": _flux2_klein,
    "zimage": _zimage,
    "qwen-image": _qwen_image,
}
"""Name of a family → function that makes its parts; FLUX.2 klein is the one with 4 billion parameters"""


def real_base(family: str) -> Base:
    """Return a base in its published configuration, in bfloat16 on the device ``meta``."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        parts = REAL[family]()
    base = Base(name=f"a real {family}", family=families()[family], tokenizer=qwen_tokenizer(), **parts)
    return base.to("meta", torch.bfloat16)
