"""Qwen-Image: a transformer of double blocks over 2 × 2 latents, told by Qwen2.5-VL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import (
    JOINT_ATTENTION,
    QWEN_LAYERS,
    QWEN_TOKENIZER,
    SCHEDULER,
    affects_states,
    language_states,
    packed,
    unpacked,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.qwen_vae import QWEN_VAE, QwenVaeFamily
from diffgraft.bases.shape_table import ShapeTable

_LENGTH = 512
"""Tokens of a prompt at most"""
_UNUSED = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Layers of the last block that only change the text, which is not used after it"""
_BLOCK = (
    *JOINT_ATTENTION,
    *("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
    *("img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
_ENDS = (
    *("img_in", "txt_norm", "txt_in", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {name: name for name in _ENDS},
        ("transformer_blocks.*.", "transformer_blocks.*."): {name: name for name in _BLOCK},
    },
    sizes=frozenset({(3072, 60)}),
)
"""Names in QwenLM/Qwen-Image, which are those of diffusers"""


class QwenImage(QwenVaeFamily):
    """The family of Qwen-Image (Wu et al. 2025, arXiv:2508.02324)."""

    name = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("QwenImageTransformer2DModel",)),
        "vae": QWEN_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen2_5_VLForConditionalGeneration",)),
        "tokenizer": QWEN_TOKENIZER,
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": JOINT_ATTENTION,
            "feedforward": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
            "modulation": ("img_mod.1", "txt_mod.1"),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("QwenImageTransformerBlock",)
    original = _ORIGINAL
    published = "Qwen/Qwen-Image"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depth and widths."""
        head = max(1, shapes.size("transformer_blocks.0.attn.norm_q.weight"))
        return {
            "patch_size": 2,
            "in_channels": shapes.size("img_in.weight", 1),
            "out_channels": shapes.size("proj_out.weight") // 4,
            "num_layers": shapes.count("transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": shapes.size("img_in.weight") // head,
            "joint_attention_dim": shapes.size("txt_in.weight", 1),
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare 2 × 2 latents, and the states of Qwen2.5-VL."""
        config = parts["transformer"].config
        yield "2 × 2 latents", config.in_channels, 4 * parts["vae"].config.z_dim
        text = parts["text_encoder"].config.get_text_config()
        yield "states of text", config.joint_attention_dim, text.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the encoder's last states of the prompt, [n, 512, width], padded with zeros, and a mask of its tokens.

        The prompt is put into the model's own template, whose states are dropped. Longer prompts are truncated.
        """
        pipe = base.pipeline()
        template, first = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        texts = [template.format(prompt) for prompt in prompts]
        states, mask = language_states(base, texts, first + _LENGTH)
        kept = mask[:, first:]
        return Conditioning(states[-1][:, first:] * kept.unsqueeze(-1).to(states[-1]), {"mask": kept})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        states, mask = conditioning.hidden_states.to(dtype), conditioning.added["mask"]
        longest = max(1, int(mask.sum(1).max()))
        tokens: Tensor = denoiser(
            hidden_states=packed(noisy).to(dtype),
            timestep=self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=states[:, :longest],
            encoder_hidden_states_mask=mask[:, :longest].to(states.device),
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def normed_guidance(self, guided: Tensor, plain: Tensor) -> Tensor:
        """Return `guided` with the norm of `plain` in each token, as in diffusers' ``QwenImagePipeline``."""
        height, width = guided.shape[-2:]
        tokens, wanted = packed(guided.unsqueeze(0)), packed(plain.unsqueeze(0))
        norms = tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
        return unpacked(tokens * (wanted.norm(dim=-1, keepdim=True) / norms), height, width).squeeze(0)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: the text side of the last block does not, after its keys.

        Neither do the parts of the text encoder that read pictures or write text.
        """
        if part != self.denoiser:
            count = base.text_encoder.config.get_text_config().num_hidden_layers
            return affects_states(path, count, count)
        last = f"transformer_blocks.{base.denoiser.config.num_layers - 1}."
        return not path.startswith(last) or path.removeprefix(last) not in _UNUSED


FAMILY = QwenImage()
