"""FLUX.1: a transformer of double and single blocks, told by CLIP's pooled embedding and T5."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import (
    BUNDLED_VAE,
    CLIP_LAYERS,
    FLUX_ATTENTION,
    FLUX_SCALES,
    JOINT_ATTENTION,
    KL_VAE,
    SCHEDULER,
    T5_LAYERS,
    FlowFamily,
    grid_ids,
    packed,
    unpacked,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable

_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        ("time_in.", "time_text_embed.timestep_embedder."): {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("guidance_in.", "time_text_embed.guidance_embedder."): {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("vector_in.", "time_text_embed.text_embedder."): {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("double_blocks.*.", "transformer_blocks.*."): {
            **FLUX_ATTENTION,
            "img_mod.lin": "norm1.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mod.lin": "norm1_context.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
        ("single_blocks.*.", "single_transformer_blocks.*."): {
            "modulation.lin": "norm.linear",
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": "proj_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    },
    shares={"single_blocks.*.linear1": (1, 1, 1, 4)},
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    scales=FLUX_SCALES,
    shapes={
        "final_layer.adaLN_modulation.1": (2, 1),
        **{f"double_blocks.*.{side}_mlp.0": (4, 1) for side in ("img", "txt")},
        **{f"double_blocks.*.{side}_mlp.2": (1, 4) for side in ("img", "txt")},
        "single_blocks.*.linear1": (7, 1),
        "single_blocks.*.linear2": (1, 5),
    },
    sizes=frozenset({(3072, 19)}),
)
"""Names in black-forest-labs/flux, ``src/flux/model.py`` and ``modules/layers.py``"""


class Flux1(FlowFamily):
    """The family of FLUX.1 dev and schnell (Black Forest Labs 2024), with 2 × 2 latents as a token."""

    name = "flux1"
    pipeline_class = "FluxPipeline"
    guidance = 1.0
    text = (TextSlot("text_encoder", "tokenizer"), TextSlot("text_encoder_2", "tokenizer_2"))
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("FluxTransformer2DModel",)),
        "vae": KL_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("CLIPTextModel",)),
        "tokenizer": Component("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "text_encoder_2": Component("transformers", ("T5EncoderModel",)),
        "tokenizer_2": Component("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": JOINT_ATTENTION,
            "feedforward": (
                *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
                *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
            ),
            "modulation": ("norm1.linear", "norm1_context.linear", "single_transformer_blocks.*.norm.linear"),
        },
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": T5_LAYERS,
    }
    checkpointed = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    original = _ORIGINAL
    bundled = {  # noqa: RUF012
        "vae": BUNDLED_VAE,
        "text_encoder": ("text_encoders.clip_l.transformer.",),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.",),
    }
    published = "black-forest-labs/FLUX.1-dev"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depths and widths, and whether it is FLUX.1 dev, which reads the scale of guidance."""
        head = max(1, shapes.size("transformer_blocks.0.attn.norm_q.weight"))
        return {
            "patch_size": 1,
            "in_channels": shapes.size("x_embedder.weight", 1),
            "out_channels": shapes.size("proj_out.weight"),
            "num_layers": shapes.count("transformer_blocks"),
            "num_single_layers": shapes.count("single_transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": shapes.size("x_embedder.weight") // head,
            "joint_attention_dim": shapes.size("context_embedder.weight", 1),
            "pooled_projection_dim": shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare 2 × 2 latents, the states of T5 and the pooled embedding of CLIP."""
        config = parts["transformer"].config
        yield "2 × 2 latents", config.in_channels, 4 * parts["vae"].config.latent_channels
        yield "states of text", config.joint_attention_dim, parts["text_encoder_2"].config.d_model
        yield "pooled text", config.pooled_projection_dim, parts["text_encoder"].config.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return T5's states [n, 512, 4096] and CLIP's pooled embedding; longer prompts are truncated."""
        states, pooled, _ = base.pipeline().encode_prompt(list(prompts), None)
        return Conditioning(states, {"pooled_projections": pooled})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        states, guidance = conditioning.hidden_states.to(dtype), None
        if self.embeds_guidance(base):
            # sd-scripts trains at 1, so that the distillation is kept
            guidance = conditioning.added.get("guidance", torch.ones(len(noisy), device=noisy.device))
        tokens = denoiser(
            hidden_states=packed(noisy).to(dtype),
            timestep=self.sigmas(base, timesteps, noisy),
            guidance=guidance,
            pooled_projections=conditioning.added["pooled_projections"].to(dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=grid_ids(height // 2, width // 2, noisy),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def embeds_guidance(self, base: Base) -> bool:
        """Whether it is FLUX.1 dev; schnell reads no guidance."""
        return bool(base.denoiser.config.guidance_embeds)


FAMILY = Flux1()
