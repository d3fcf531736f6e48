"""Krea 2: one stream of text and picture tokens, told by twelve layers of Qwen3-VL."""

from collections.abc import Sequence

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
from diffgraft.bases.qwen_vae import QWEN_VAE, QwenVaeFamily

_LENGTH = 512
"""Tokens of a prompt with the end of its template, padding included"""


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
    checkpointed = ("Krea2TransformerBlock", "Krea2TextFusionBlock")

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
