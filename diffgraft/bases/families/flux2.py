"""FLUX.2 klein: a transformer of double and single blocks over latents of 16 pixels, told by Qwen3."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, LatentSpec, TextSlot
from diffgraft.bases.flow import (
    FLUX_ATTENTION,
    FLUX_SCALES,
    JOINT_ATTENTION,
    QWEN_LAYERS,
    QWEN_TOKENIZER,
    SCHEDULER,
    FlowFamily,
    affects_states,
    as_message,
    grid_ids,
    language_states,
)
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable

_LENGTH = 512
"""Tokens of a prompt, padding included"""
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        ("time_in.", "time_guidance_embed.timestep_embedder."): {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("guidance_in.", "time_guidance_embed.guidance_embedder."): {"in_layer": "linear_1", "out_layer": "linear_2"},
        ("double_blocks.*.", "transformer_blocks.*."): {
            **FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        ("single_blocks.*.", "single_transformer_blocks.*."): {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    scales=FLUX_SCALES,
    shapes={
        "final_layer.adaLN_modulation.1": (2, 1),
        **{f"double_blocks.*.{side}_mlp.0": (6, 1) for side in ("img", "txt")},
        **{f"double_blocks.*.{side}_mlp.2": (1, 3) for side in ("img", "txt")},
        "single_blocks.*.linear1": (9, 1),
        "single_blocks.*.linear2": (1, 4),
    },
    sizes=frozenset({(3072, 5), (4096, 8)}),
)
"""Names in black-forest-labs/flux2, ``src/flux2/model.py``"""


class Flux2Klein(FlowFamily):
    """The family of FLUX.2 klein 4B and 9B (Black Forest Labs 2026).

    Latents are those of 2 × 2 places of its VAE, [n, 128, height / 16, width / 16], standardized by the statistics of
    the VAE's batch norm; each is a token.
    """

    name = "flux2-klein"
    pipeline_class = "Flux2KleinPipeline"
    patch = 1
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("Flux2Transformer2DModel",)),
        "vae": Component("diffusers", ("AutoencoderKLFlux2",)),
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen3ForCausalLM",)),
        "tokenizer": QWEN_TOKENIZER,
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out"),
            "feedforward": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
            "modulation": (
                *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
                "single_stream_modulation.linear",
            ),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    original = _ORIGINAL
    published = "black-forest-labs/FLUX.2-klein-base-4B"

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depths and widths."""
        head = max(1, shapes.size("transformer_blocks.0.attn.norm_q.weight"))
        width = max(1, shapes.size("x_embedder.weight"))
        return {
            "patch_size": 1,
            "in_channels": shapes.size("x_embedder.weight", 1),
            "out_channels": shapes.size("proj_out.weight"),
            "num_layers": shapes.count("transformer_blocks"),
            "num_single_layers": shapes.count("single_transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes.size("context_embedder.weight", 1),
            "timestep_guidance_channels": shapes.size("time_guidance_embed.timestep_embedder.linear_1.weight", 1),
            "mlp_ratio": shapes.size("transformer_blocks.0.ff.linear_out.weight", 1) / width,
            "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare 2 × 2 latents, and the states of three layers of Qwen3."""
        config = parts["transformer"].config
        yield "2 × 2 latents", config.in_channels, 4 * parts["vae"].config.latent_channels
        yield "states of text", config.joint_attention_dim, 3 * parts["text_encoder"].config.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the states of three of Qwen3's layers beside one another, [n, 512, 3 · width], padding included."""
        texts = [as_message(base, prompt, thinking=False) for prompt in prompts]
        states, _ = language_states(base, texts, _LENGTH)
        return Conditioning(torch.cat([states[layer] for layer in self._text_layers(base)], -1))

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        states = conditioning.hidden_states.to(dtype)
        places = torch.arange(states.shape[1], device=noisy.device).unsqueeze(1)
        tokens: Tensor = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(dtype),
            timestep=self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=states,
            txt_ids=nn.functional.pad(places, (3, 0)),
            img_ids=nn.functional.pad(grid_ids(height, width, places), (0, 1)),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(noisy.shape)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: layers of the text encoder behind those that are used do not."""
        used, count = self._text_layers(base)[-1], base.text_encoder.config.num_hidden_layers
        return part == self.denoiser or affects_states(path, used, count)

    def pixels_per_latent(self, base: Base) -> int:
        """Return 16: the VAE's 8, twice, as 2 × 2 of its latents are one."""
        return 2 * super().pixels_per_latent(base)

    def latents(self, base: Base) -> LatentSpec:
        """Return the channels of 2 × 2 latents of the VAE; `posterior` standardizes each of them."""
        return LatentSpec(4 * int(base.vae.config.latent_channels), 1.0)

    def posterior(self, base: Base, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures [n, 3, height, width] to mean and standard deviation of their latents, in float32."""
        found = base.vae.encode(pixels.to(base.vae.device, base.vae.dtype)).latent_dist
        mean, std = (nn.functional.pixel_unshuffle(value.float(), 2) for value in (found.mean, found.std))
        center, spread = self._statistics(base, mean)
        return (mean - center) / spread, std / spread

    def decode(self, base: Base, latents: Tensor) -> Tensor:
        """Decode latents [n, c, h, w] to pictures [n, 3, height, width] with values from about -1 to 1."""
        center, spread = self._statistics(base, latents)
        raw = nn.functional.pixel_shuffle(latents * spread + center, 2)
        pixels: Tensor = base.vae.decode(raw.to(base.vae.dtype)).sample
        return pixels

    def size_shift(self, base: Base, tokens: int, steps: int) -> float:  # noqa: ARG002
        """Return μ as fitted by the model's authors to the number of tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))

    @staticmethod
    def _statistics(base: Base, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel, [1, c, 1, 1]."""
        norm = base.vae.bn
        variance = norm.running_var + base.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1).to(like), variance.sqrt().view(1, -1, 1, 1).to(like)

    @staticmethod
    def _text_layers(base: Base) -> tuple[int, int, int]:
        """Return the layers whose states are used: 9, 18 and 27 of Qwen3's 36, and the same shares of others."""
        count = base.text_encoder.config.num_hidden_layers
        return round(count / 4), round(count / 2), round(3 * count / 4)


FAMILY = Flux2Klein()
