"""Qwen-Image: a transformer of double blocks over 2 × 2 latents, told by Qwen2.5-VL."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, LatentSpec, TextSlot
from diffgraft.bases.flow import (
    JOINT_ATTENTION,
    QWEN_LAYERS,
    QWEN_TOKENIZER,
    SCHEDULER,
    FlowFamily,
    language_states,
    packed,
    unpacked,
)
from diffgraft.bases.original_layout import OriginalLayout

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


class QwenImage(FlowFamily):
    """The family of Qwen-Image (Wu et al. 2025, arXiv:2508.02324)."""

    name = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("QwenImageTransformer2DModel",)),
        "vae": Component("diffusers", ("AutoencoderKLQwenImage",)),
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

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the encoder's last states of the prompt, [n, 512, width] with zeros behind, and a mask of its tokens.

        The prompt stands in the model's own instruction, whose states are dropped. Longer prompts are truncated.
        """
        pipe = base.pipeline()
        template, first = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        texts = [template.format(prompt) for prompt in prompts]
        states, mask = language_states(base, texts, first + _LENGTH)
        kept = mask[:, first:]
        return Conditioning(states[-1][:, first:] * kept.unsqueeze(-1), {"mask": kept})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        states, mask = conditioning.hidden_states.to(dtype), conditioning.added["mask"]
        longest = _LENGTH if mask.is_meta else max(1, int(mask.sum(1).max()))
        tokens: Tensor = denoiser(
            hidden_states=packed(noisy).to(dtype),
            timestep=self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=states[:, :longest],
            encoder_hidden_states_mask=mask[:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: the text side of the last block does not, after its keys."""
        last = f"transformer_blocks.{base.denoiser.config.num_layers - 1}."
        return part != self.denoiser or path.removeprefix(last) not in _UNUSED or not path.startswith(last)

    def pixels_per_latent(self, base: Base) -> int:
        """Return the number of pixels per latent along one side, 8."""
        return int(2 ** len(base.vae.temperal_downsample))

    def latents(self, base: Base) -> LatentSpec:
        """Return the channels of the VAE; `posterior` standardizes each of them."""
        return LatentSpec(int(base.vae.config.z_dim), 1.0)

    def posterior(self, base: Base, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures [n, 3, height, width] to mean and standard deviation of their latents, in float32.

        The VAE is one of videos, and a picture is a video of one frame.
        """
        found = base.vae.encode(pixels.to(base.vae.device, base.vae.dtype).unsqueeze(2)).latent_dist
        mean, std = found.mean[:, :, 0].float(), found.std[:, :, 0].float()
        center, spread = self._statistics(base, mean)
        return (mean - center) / spread, std / spread

    def decode(self, base: Base, latents: Tensor) -> Tensor:
        """Decode latents [n, c, h, w] to pictures [n, 3, height, width] with values from about -1 to 1."""
        center, spread = self._statistics(base, latents)
        raw = (latents * spread + center).to(base.vae.dtype)
        pixels: Tensor = base.vae.decode(raw.unsqueeze(2)).sample[:, :, 0]
        return pixels

    @staticmethod
    def _statistics(base: Base, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel, [1, c, 1, 1]."""
        config = base.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(like), std.to(like)


FAMILY = QwenImage()
