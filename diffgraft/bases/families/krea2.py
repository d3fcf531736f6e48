"""Krea 2: one stream of text and picture tokens, told by twelve layers of Qwen3-VL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import (
    QWEN_LAYERS,
    QWEN_TOKENIZER,
    SCHEDULER,
    affects_states,
    grid_ids,
    packed,
    unpacked,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.qwen_vae import QWEN_VAE, QwenVaeFamily
from diffgraft.bases.shape_table import ShapeTable

_LENGTH = 512
"""Tokens of a prompt with the end of its template, padding included"""
_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "prenorm": "norm1",
    "postnorm": "norm2",
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}
_BLOCKS = {
    "blocks.*.": "transformer_blocks.*.",
    **{f"txtfusion.{name}_blocks.*.": f"text_fusion.{name}_blocks.*." for name in ("layerwise", "refiner")},
}
"""Beginnings of paths in both layouts, original → diffusers"""
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "first": "img_in",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.0": "txt_in.norm",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
            "last.linear": "final_layer.linear",
            "last.norm": "final_layer.norm",
        },
        **dict.fromkeys(_BLOCKS.items(), _BLOCK),
    },
    sizes=frozenset({(6144, 28)}),
    scales=frozenset({"txtmlp.0", "last.norm"})
    | {
        f"{block}{norm}"
        for block in _BLOCKS
        for norm in ("prenorm", "postnorm", "attn.qknorm.qnorm", "attn.qknorm.knorm")
    },
    parameters={
        "blocks.*.mod.lin": "transformer_blocks.*.scale_shift_table",
        "last.modulation.lin": "final_layer.scale_shift_table",
    },
    flat=frozenset({"blocks.*.mod.lin"}),
)
"""Names in the files that Krea publishes, which ComfyUI and the trainers use"""


class Krea2(QwenVaeFamily):
    """The family of Krea 2 (Krea 2026); its transformer fuses states of several layers of the text encoder itself."""

    name = "krea2"
    pipeline_class = "Krea2Pipeline"
    guidance = 5.5
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("Krea2Transformer2DModel",)),
        "vae": QWEN_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen3VLModel",)),
        "tokenizer": QWEN_TOKENIZER,
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0"),
            "feedforward": ("ff.gate", "ff.up", "ff.down"),
            "modulation": ("time_mod_proj",),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("Krea2TransformerBlock",)
    original = _ORIGINAL
    published = "krea/Krea-2-Raw"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depths and widths, those of its blocks over text included."""
        first, text = "transformer_blocks.0", "text_fusion.refiner_blocks.0"
        head, text_head = (max(1, shapes.size(f"{block}.attn.norm_q.weight")) for block in (first, text))
        return {
            "in_channels": shapes.size("img_in.weight", 1),
            "num_layers": shapes.count("transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": shapes.size(f"{first}.attn.to_q.weight") // head,
            "num_key_value_heads": shapes.size(f"{first}.attn.to_k.weight") // head,
            "intermediate_size": shapes.size(f"{first}.ff.gate.weight"),
            "timestep_embed_dim": shapes.size("time_embed.linear_1.weight", 1),
            "text_hidden_dim": shapes.size("txt_in.linear_1.weight", 1),
            "num_text_layers": shapes.size("text_fusion.projector.weight", 1),
            "text_num_attention_heads": shapes.size(f"{text}.attn.to_q.weight") // text_head,
            "text_num_key_value_heads": shapes.size(f"{text}.attn.to_k.weight") // text_head,
            "text_intermediate_size": shapes.size(f"{text}.ff.gate.weight"),
            "num_layerwise_text_blocks": shapes.count("text_fusion.layerwise_blocks"),
            "num_refiner_text_blocks": shapes.count("text_fusion.refiner_blocks"),
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Yield widths that have to agree: of 2 × 2 latents with the VAE, and of the states with Qwen3-VL."""
        config = parts["transformer"].config
        yield "2 × 2 latents", config.in_channels, 4 * parts["vae"].config.z_dim
        yield "states of text", config.text_hidden_dim, parts["text_encoder"].config.get_text_config().hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return states of several layers beside one another, [n, 512, layers · width], and a mask of their tokens.

        Padding stands between the prompt and the end of the template and takes no position, as in the model's training.
        """
        pipe, tokenizer = base.pipeline(), base.tokenizer
        start, end = pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode_num_suffix_tokens
        texts = [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]
        length = _LENGTH + start - end
        read = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        last = tokenizer([pipe.prompt_template_encode_suffix] * len(texts), return_tensors="pt")
        ids = torch.cat([read.input_ids, last.input_ids], 1).to(base.device)
        mask = torch.cat([read.attention_mask, last.attention_mask], 1).to(base.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        # the library looks into a mask of two axes, which has no values on `meta`
        seen = mask.new_empty(len(mask), 1, mask.shape[1], mask.shape[1], dtype=torch.bool) if mask.is_meta else mask
        found = base.text_encoder(
            input_ids=ids, attention_mask=seen, position_ids=positions, output_hidden_states=True
        ).hidden_states
        states = torch.cat([found[layer][:, start:] for layer in self._text_layers(base)], -1)
        return Conditioning(states, {"mask": mask[:, start:].bool()})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        states = conditioning.hidden_states.to(dtype)
        states = states.view(*states.shape[:2], base.denoiser.config.num_text_layers, -1)
        grid = grid_ids(height // 2, width // 2, noisy)
        tokens: Tensor = denoiser(
            hidden_states=packed(noisy).to(dtype),
            encoder_hidden_states=states,
            timestep=self.sigmas(base, timesteps, noisy),
            position_ids=torch.cat([grid.new_zeros(states.shape[1], 3), grid]),
            encoder_attention_mask=conditioning.added["mask"],
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: parts of the text encoder that are not read do not."""
        count = base.text_encoder.config.get_text_config().num_hidden_layers
        return part == self.denoiser or affects_states(path, self._text_layers(base)[-1], count)

    @staticmethod
    def _text_layers(base: Base) -> list[int]:
        """Return the layers whose states are used: 2, 5, … 35 of Qwen3-VL's 36, and the same shares of others."""
        count, used = base.text_encoder.config.get_text_config().num_hidden_layers, base.denoiser.config.num_text_layers
        return [(place + 1) * count // used - 1 for place in range(used)]


FAMILY = Krea2()
