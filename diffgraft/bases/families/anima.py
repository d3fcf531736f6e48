"""Anima: the transformer of Cosmos Predict2, told by Qwen3 through a small network over the ids of T5's tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import QWEN_LAYERS, QWEN_TOKENIZER, SCHEDULER, FlowFamily, affects_states, language_states
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.qwen_vae import QWEN_VAE, QwenVaeFamily
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.diffusion.parameterizations import Flow, Parameterization
from diffgraft.third_party import mask_padding_without_torchvision

_LENGTH = 512
"""Tokens of a prompt at most, by either tokenizer"""
_MODULATION = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
"""Part of a block in the original layout → its modulation in diffusers"""
_ATTENTION = {
    **{f"{name}_proj": f"to_{name}" for name in "qkv"},
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {
            "x_embedder.proj.1": "patch_embed.proj",
            "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
            "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
            "t_embedding_norm": "time_embed.norm",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
            "final_layer.linear": "proj_out",
        },
        ("blocks.*.", "transformer_blocks.*."): {
            **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
            **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
            **{
                f"adaln_modulation_{part}.{number}": f"{norm}.linear_{number}"
                for part, norm in _MODULATION.items()
                for number in (1, 2)
            },
        },
    },
    sizes=frozenset({(2048, 28)}),
    unused=frozenset({"*_extra_state", "pos_embedder.*", "accum_*"}),
)
"""Names in the code of Cosmos Predict2, which Anima's files, ComfyUI and the trainers use"""


class Anima(QwenVaeFamily):
    """The family of Anima (CircleStone Labs 2026), whose transformer is that of Cosmos Predict2 (NVIDIA 2025).

    Its `text_conditioner` reads the ids of T5's tokens, and attends to what Qwen3 says of the prompt. It stays frozen.
    """

    name = "anima"
    pipeline_class = "AnimaModularPipeline"
    text = (TextSlot("text_encoder", "tokenizer"),)
    conditioners = (TextSlot("text_conditioner", "t5_tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("CosmosTransformer3DModel",)),
        "vae": QWEN_VAE,
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen3Model",)),
        "tokenizer": QWEN_TOKENIZER,
        "text_conditioner": Component("diffusers", ("AnimaTextConditioner",)),
        "t5_tokenizer": Component("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": tuple(
                f"{part}.{layer}" for part in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
            ),
            "feedforward": ("ff.net.0.proj", "ff.net.2"),
            "modulation": tuple(
                f"transformer_blocks.*.{norm}.linear_{number}" for norm in _MODULATION.values() for number in (1, 2)
            ),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("CosmosTransformerBlock",)
    original = _ORIGINAL
    bundled = {  # noqa: RUF012
        "text_conditioner": tuple(
            f"{start}llm_adapter." for start in ("", "net.", "model.diffusion_model.", "diffusion_model.")
        )
    }
    published = "circlestone-labs/Anima-Base-v1.0-Diffusers"
    unsupported = {  # noqa: RUF012
        **FlowFamily.unsupported,
        "attention": "diffusers computes the attention of Cosmos in one way only",
    }

    def parameterization(self, scheduler: Any) -> Parameterization:
        """Return the flow without the scheduler's shift, which is for drawing, as sd-scripts trains."""
        return Flow(scheduler.config.num_train_timesteps)

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return depth and widths; the scale of positions is that of Anima if no configuration tells it."""
        block = "transformer_blocks.0"
        head = max(1, shapes.size(f"{block}.attn1.norm_q.weight"))
        channels = shapes.size("proj_out.weight") // 4
        width = max(1, shapes.size("patch_embed.proj.weight"))
        return {
            "in_channels": channels,
            "out_channels": channels,
            "num_layers": shapes.count("transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "mlp_ratio": shapes.size(f"{block}.ff.net.2.weight", 1) / width,
            "text_embed_dim": shapes.size(f"{block}.attn2.to_k.weight", 1),
            "adaln_lora_dim": shapes.size(f"{block}.norm1.linear_1.weight"),
            "patch_size": [1, 2, 2],
            "rope_scale": config.get("rope_scale", [1.0, 4.0, 4.0]),
            "concat_padding_mask": shapes.size("patch_embed.proj.weight", 1) > 4 * channels,
            "extra_pos_embed_type": None,
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare latents, and the states that text encoder, conditioner and transformer hand on."""
        config, conditioner = parts["transformer"].config, parts["text_conditioner"].config
        yield "latents", config.in_channels, parts["vae"].config.z_dim
        yield "states of text", config.text_embed_dim, conditioner.target_dim
        yield "states of Qwen3", conditioner.source_dim, parts["text_encoder"].config.hidden_size

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return the states of the conditioner, [n, 512, width], with zeros for padding.

        Longer prompts are truncated, by the length of either tokenizer.
        """
        conditioner: Any = base.text_conditioner  # type: ignore[attr-defined]
        states, mask = language_states(base, prompts, _LENGTH, "right")
        mask = mask.to(base.device)
        ids = base.t5_tokenizer(  # type: ignore[attr-defined]
            list(prompts),
            padding="max_length",
            max_length=_LENGTH,
            truncation=True,
            padding_side="right",
            return_tensors="pt",
        )
        told = conditioner(
            source_hidden_states=states[-1].to(conditioner.dtype) * mask.unsqueeze(-1),
            target_input_ids=ids.input_ids.to(base.device),
            target_attention_mask=ids.attention_mask.to(base.device),
            source_attention_mask=mask,
        )
        return Conditioning(told)

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        mask_padding_without_torchvision()
        dtype = base.denoiser.dtype
        prediction: Tensor = denoiser(
            hidden_states=noisy.to(dtype).unsqueeze(2),
            timestep=self.sigmas(base, timesteps, noisy),
            encoder_hidden_states=conditioning.hidden_states.to(dtype),
            padding_mask=noisy.new_zeros(1, 1, *noisy.shape[-2:], dtype=dtype),
            return_dict=False,
        )[0]
        return prediction.squeeze(2)

    def pipeline(self, base: Base) -> Any:
        """Return diffusers' modular pipeline of the modules of `base`."""
        mask_padding_without_torchvision()
        return super().pipeline(base)

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: all of the transformer, and all that makes Qwen3's states, do."""
        count = base.text_encoder.config.num_hidden_layers
        return part == self.denoiser or affects_states(path, count, count)


FAMILY = Anima()
