"""Stable Diffusion 3 and 3.5: a transformer over text and picture, told by two CLIPs and T5."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import (
    BUNDLED_VAE,
    CLIP_LAYERS,
    JOINT_ATTENTION,
    KL_VAE,
    SCHEDULER,
    T5_LAYERS,
    FlowFamily,
    levels,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable

_CLIP = Component("transformers", ("CLIPTextModelWithProjection",))
_TOKENIZER = Component("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        ("t_embedder.mlp.", "time_text_embed.timestep_embedder."): {"0": "linear_1", "2": "linear_2"},
        ("y_embedder.mlp.", "time_text_embed.text_embedder."): {"0": "linear_1", "2": "linear_2"},
        ("joint_blocks.*.x_block.", "transformer_blocks.*."): {
            "adaLN_modulation.1": "norm1.linear",
            "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn.proj": "attn.to_out.0",
            "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
            "attn2.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
        ("joint_blocks.*.context_block.", "transformer_blocks.*."): {
            "adaLN_modulation.1": "norm1_context.linear",
            "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "attn.proj": "attn.to_add_out",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1", "joint_blocks.*.context_block.adaLN_modulation.1"}),
    shapes={"final_layer.adaLN_modulation.1": (2, 1)},
    sizes=frozenset({(1536, 24), (2432, 38)}),
    parameters={"pos_embed": "pos_embed.pos_embed"},
)
"""Names in Stability-AI/sd3.5, ``mmditx.py``; in the last block, the text has only a shift and a scale"""


class StableDiffusion3(FlowFamily):
    """The family of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    guidance = 7.0
    text = (
        TextSlot("text_encoder", "tokenizer"),
        TextSlot("text_encoder_2", "tokenizer_2"),
        TextSlot("text_encoder_3", "tokenizer_3"),
    )
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("SD3Transformer2DModel",)),
        "vae": KL_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": _CLIP,
        "tokenizer": _TOKENIZER,
        "text_encoder_2": _CLIP,
        "tokenizer_2": _TOKENIZER,
        "text_encoder_3": Component("transformers", ("T5EncoderModel",), required=False),
        "tokenizer_3": Component("transformers", ("T5Tokenizer", "T5TokenizerFast"), required=False),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": (*JOINT_ATTENTION, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
            "feedforward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            "modulation": ("norm1.linear", "norm1_context.linear"),
        },
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
        "text_encoder_3": T5_LAYERS,
    }
    checkpointed = ("JointTransformerBlock",)
    original = _ORIGINAL
    bundled = {  # noqa: RUF012
        "vae": BUNDLED_VAE,
        "text_encoder": ("text_encoders.clip_l.transformer.",),
        "text_encoder_2": ("text_encoders.clip_g.transformer.",),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
    }
    published = "stabilityai/stable-diffusion-3.5-medium"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return depth and widths, which blocks have a second attention, and whether queries and keys are normed.

        Without norms no weight has the width of a head, which is 64 in Stable Diffusion 3.
        """
        width, norm = shapes.size("pos_embed.proj.weight"), "transformer_blocks.0.attn.norm_q.weight"
        head = shapes.size(norm) if norm in shapes else int(config.get("attention_head_dim", 64))
        patch = shapes.size("pos_embed.proj.weight", 2)
        return {
            "patch_size": patch,
            "in_channels": shapes.size("pos_embed.proj.weight", 1),
            "out_channels": shapes.size("proj_out.weight") // max(1, patch) ** 2,
            "num_layers": shapes.count("transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // max(1, head),
            "joint_attention_dim": shapes.size("context_embedder.weight", 1),
            "caption_projection_dim": shapes.size("context_embedder.weight"),
            "pooled_projection_dim": shapes.size("time_text_embed.text_embedder.linear_1.weight", 1),
            "pos_embed_max_size": math.isqrt(shapes.size("pos_embed.pos_embed", 1)),
            "dual_attention_layers": shapes.indices("transformer_blocks.*.attn2."),
            "qk_norm": "rms_norm" if norm in shapes else None,
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare latents, the states of T5, and the pooled embeddings of both CLIPs."""
        config = parts["transformer"].config
        yield "latents", config.in_channels, parts["vae"].config.latent_channels
        if parts["text_encoder_3"] is not None:
            yield "states of text", config.joint_attention_dim, parts["text_encoder_3"].config.d_model
        pooled = sum(parts[name].config.projection_dim for name in ("text_encoder", "text_encoder_2"))
        yield "pooled text", config.pooled_projection_dim, pooled

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the states of both CLIPs beside those of T5, [n, 77 + 256, 4096], and pooled embeddings.

        Prompts are truncated to the encoders' lengths. Without T5, its states are zeros.
        """
        texts = list(prompts)
        states, _, pooled, _ = base.pipeline().encode_prompt(texts, texts, texts, do_classifier_free_guidance=False)
        return Conditioning(states, {"pooled_projections": pooled})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype = base.denoiser.dtype
        prediction: Tensor = denoiser(
            hidden_states=noisy.to(dtype),
            timestep=1000 * self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=conditioning.hidden_states.to(dtype),
            pooled_projections=conditioning.added["pooled_projections"].to(dtype),
            return_dict=False,
        )[0]
        return prediction

    def schedule_timesteps(self, inputs: Tensor) -> Tensor:
        """Return `inputs` [n], which is 1000 · σ."""
        return inputs

    def sampling_sigmas(self, base: Base, tokens: int, steps: int) -> list[float] | None:  # noqa: ARG002
        """Return the noise levels of diffusers' scheduler, which are even in σ before its shift."""
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        scheduler.set_timesteps(steps)
        return levels(scheduler.sigmas)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: the queries of the text in the last block do not."""
        last = f"transformer_blocks.{base.denoiser.config.num_layers - 1}.attn."
        return part != self.denoiser or path not in (f"{last}add_q_proj", f"{last}norm_added_q")


FAMILY = StableDiffusion3()
