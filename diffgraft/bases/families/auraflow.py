"""AuraFlow: a transformer over text and picture, first in two streams and then in one, told by a T5."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import CLIP_LAYERS, JOINT_ATTENTION, KL_VAE, SCHEDULER, T5_LAYERS, FlowFamily, levels
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.errors import DiffgraftError

_LENGTH = 256
"""Tokens of a prompt at most"""
_NATIVE_PIXELS = 1024
_FEED_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_BOTH = "double_layers.*.", "joint_transformer_blocks.*."
_ONE = "single_layers.*.", "single_transformer_blocks.*."
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "init_x_linear": "pos_embed.proj",
            "cond_seq_linear": "context_embedder",
            "t_embedder.mlp.0": "time_step_proj.linear_1",
            "t_embedder.mlp.2": "time_step_proj.linear_2",
            "modF.1": "norm_out.linear",
            "final_linear": "proj_out",
        },
        _BOTH: {
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
            **{f"attn.w2{part}": f"attn.to_{part}" for part in "qkv"},
            "attn.w2o": "attn.to_out.0",
            **{f"attn.w1{part}": f"attn.add_{part}_proj" for part in "qkv"},
            "attn.w1o": "attn.to_add_out",
            **{f"mlpX.{theirs}": f"ff.{ours}" for theirs, ours in _FEED_FORWARD.items()},
            **{f"mlpC.{theirs}": f"ff_context.{ours}" for theirs, ours in _FEED_FORWARD.items()},
        },
        _ONE: {
            "modCX.1": "norm1.linear",
            **{f"attn.w1{part}": f"attn.to_{part}" for part in "qkv"},
            "attn.w1o": "attn.to_out.0",
            **{f"mlp.{theirs}": f"ff.{ours}" for theirs, ours in _FEED_FORWARD.items()},
        },
    },
    swapped=frozenset({"modF.1"}),
    shapes={"modF.1": (2, 1)},
    parameters={"positional_encoding": "pos_embed.pos_embed", "register_tokens": "register_tokens"},
)
"""Names in the checkpoints of fal, as diffusers 0.42.1 reads them (``loaders/single_file_utils.py``)"""


class AuraFlow(FlowFamily):
    """The family of AuraFlow (fal 2024) and Pony V7, and of the embedded base ``tiny-flow``.

    The transformer takes σ in the place of a timestep. Its text encoder is a T5, or a CLIP as that of ``tiny-flow``.
    """

    name = "auraflow"
    pipeline_class = "AuraFlowPipeline"
    guidance = 3.5
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("AuraFlowTransformer2DModel",)),
        "vae": KL_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("UMT5EncoderModel", "T5EncoderModel", "CLIPTextModel")),
        "tokenizer": Component(
            "transformers",
            ("LlamaTokenizer", "LlamaTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "CLIPTokenizer"),
        ),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": JOINT_ATTENTION,
            "feedforward": tuple(
                f"{stream}.{layer}" for stream in ("ff", "ff_context") for layer in _FEED_FORWARD.values()
            ),
            "modulation": ("norm1.linear", "norm1_context.linear"),
        },
        "text_encoder": {group: (*T5_LAYERS[group], *CLIP_LAYERS[group]) for group in T5_LAYERS},
    }
    checkpointed = ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock")
    original = _ORIGINAL
    published = "fal/AuraFlow-v0.3"
    unsupported: Mapping[str, str] = {
        **FlowFamily.unsupported,
        "attention": "diffusers has one kernel for its attention, PyTorch's own",
    }

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return depth and widths; no weight has the width of a head, which is 256 in AuraFlow."""
        width, head = shapes.size("pos_embed.proj.weight"), int(config.get("attention_head_dim", 256))
        patch = int(config.get("patch_size", 2))
        channels = shapes.size("pos_embed.proj.weight", 1) // max(1, patch) ** 2
        return {
            "in_channels": channels,
            "out_channels": shapes.size("proj_out.weight") // max(1, patch) ** 2,
            "num_mmdit_layers": shapes.count("joint_transformer_blocks"),
            "num_single_dit_layers": shapes.count("single_transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // max(1, head),
            "joint_attention_dim": shapes.size("context_embedder.weight", 1),
            "caption_projection_dim": shapes.size("context_embedder.weight"),
            "pos_embed_max_size": shapes.size("pos_embed.pos_embed", 1),
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare latents and the states of the text encoder."""
        config, encoder = parts["transformer"].config, parts["text_encoder"].config
        yield "latents", config.in_channels, parts["vae"].config.latent_channels
        yield "states of text", config.joint_attention_dim, getattr(encoder, "d_model", None) or encoder.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the last states of the encoder, [n, 256, width], with zeros for padding.

        An encoder of fewer positions gets as many tokens as its tokenizer returns; longer prompts are truncated.
        """
        ids = base.tokenizer(
            list(prompts), padding="max_length", max_length=_length(base), truncation=True, return_tensors="pt"
        )
        mask = ids.attention_mask.to(base.device)
        # the library looks into a mask, which has no values on `meta`
        states = base.text_encoder(ids.input_ids.to(base.device), None if mask.is_meta else mask)[0]
        return Conditioning(states * mask.unsqueeze(-1))

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, largest = base.denoiser.dtype, _largest(base)
        if max(noisy.shape[-2:]) > largest:
            pixels = largest * self.pixels_per_latent(base)
            raise DiffgraftError(
                f"The base {base.name} has positions for pictures of up to {pixels} × {pixels} pixels: choose a "
                "smaller size."
            )
        prediction: Tensor = denoiser(
            noisy.to(dtype),
            conditioning.hidden_states.to(dtype),
            self.sigmas(base, timesteps, noisy).to(dtype),
            return_dict=False,
        )[0]
        return prediction

    def native_size(self, base: Base) -> int:
        """Return the side of 1024 pixels in latents, or the largest that the base has positions for."""
        return min(_NATIVE_PIXELS // self.pixels_per_latent(base), _largest(base))

    def sampling_sigmas(self, base: Base, tokens: int, steps: int) -> list[float] | None:  # noqa: ARG002
        """Return the noise levels of diffusers' scheduler, which are even in σ before its shift."""
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        scheduler.set_timesteps(steps)
        return levels(scheduler.sigmas)

    def pipeline(self, base: Base) -> Any:
        """Return diffusers' pipeline, which pads prompts to 256 tokens, or to as many as the encoder has positions."""
        pipe, longest = super().pipeline(base), _length(base)
        encode = pipe.encode_prompt

        def encode_prompt(*words: Any, max_sequence_length: int = _LENGTH, **named: Any) -> Any:
            return encode(*words, max_sequence_length=min(max_sequence_length, longest), **named)

        pipe.encode_prompt = encode_prompt
        return pipe


def _length(base: Base) -> int:
    """Return the number of tokens that prompts are padded to."""
    return min(_LENGTH, int(base.tokenizer.model_max_length))


def _largest(base: Base) -> int:
    """Return the largest side in latents that the transformer has positions for."""
    config = base.denoiser.config
    return int(math.isqrt(config.pos_embed_max_size) * config.patch_size)


FAMILY = AuraFlow()
