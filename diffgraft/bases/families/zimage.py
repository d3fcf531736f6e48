"""Z-Image: one stream of text and picture tokens, told by Qwen3."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import (
    BUNDLED_VAE,
    KL_VAE,
    QWEN_LAYERS,
    QWEN_TOKENIZER,
    SCHEDULER,
    FlowFamily,
    affects_states,
    as_message,
    language_states,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable

_LENGTH = 512
"""Tokens of a prompt at most"""
_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
        },
        **{(f"{blocks}.*.",) * 2: _BLOCK for blocks in ("layers", "noise_refiner", "context_refiner")},
    },
    parameters={name: name for name in ("x_pad_token", "cap_pad_token")},
    unused=frozenset({"norm_final.weight"}),
)
"""Names in the checkpoints for ComfyUI, which are those of Alpha-VLLM/Lumina-Image-2.0, ``models/model.py``"""


class ZImage(FlowFamily):
    """The family of Z-Image and Z-Image-Turbo (Tongyi 2025, arXiv:2511.22699).

    The transformer takes 1 − σ in the place of a timestep, and returns x₀ − ε.
    """

    name = "zimage"
    pipeline_class = "ZImagePipeline"
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("ZImageTransformer2DModel",)),
        "vae": KL_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen3Model", "Qwen3ForCausalLM")),
        "tokenizer": QWEN_TOKENIZER,
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
            "feedforward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            "modulation": ("layers.*.adaLN_modulation.0", "noise_refiner.*.adaLN_modulation.0"),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("ZImageTransformerBlock",)
    original = _ORIGINAL
    bundled = {  # noqa: RUF012
        "vae": BUNDLED_VAE,
        "text_encoder": ("text_encoders.qwen3_4b.transformer.",),
    }
    published = "Tongyi-MAI/Z-Image"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depths and widths."""
        embedder, norm = "all_x_embedder.2-1.weight", "layers.0.attention.norm_q.weight"
        width, head = shapes.size(embedder), max(1, shapes.size(norm))
        return {
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": shapes.size(embedder, 1) // 4,
            "dim": width,
            "n_layers": shapes.count("layers"),
            "n_refiner_layers": shapes.count("noise_refiner"),
            "n_heads": width // head,
            "n_kv_heads": shapes.size("layers.0.attention.to_k.weight") // head,
            "cap_feat_dim": shapes.size("cap_embedder.0.weight"),
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Yield widths that have to agree: of latents with the VAE, and of the states with Qwen3."""
        config = parts["transformer"].config
        yield "latents", config.in_channels, parts["vae"].config.latent_channels
        yield "states of text", config.cap_feat_dim, parts["text_encoder"].config.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the penultimate states of the encoder, [n, 512, width], and a mask of the tokens that are no padding.

        Longer prompts are truncated.
        """
        texts = [as_message(base, prompt, thinking=True) for prompt in prompts]
        states, mask = language_states(base, texts, _LENGTH)
        return Conditioning(states[-2] * mask.unsqueeze(-1).to(states[-2]), {"mask": mask})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, mask = base.denoiser.dtype, conditioning.added["mask"]
        rows = zip(conditioning.hidden_states.to(dtype), mask, strict=True)
        texts = [row[kept] for row, kept in rows]
        found = denoiser(
            list(noisy.to(dtype).unsqueeze(2)), 1 - self.sigmas(base, timesteps, noisy), texts, return_dict=False
        )[0]
        return -torch.stack(list(found)).squeeze(2)

    def schedule_timesteps(self, inputs: Tensor) -> Tensor:
        """Return 1000 · σ, where `inputs` [n] is 1 − σ."""
        return 1000 * (1 - inputs)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: the last layer of the text encoder and its norm do not."""
        count = base.text_encoder.config.num_hidden_layers
        return part == self.denoiser or affects_states(path, count - 1, count)


FAMILY = ZImage()
