"""Qwen-Image 2.1: one causal stream of text and picture tokens, told by Qwen3-VL, which draws with an alpha channel."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Conditioning, TextSlot
from diffgraft.bases.flow import QWEN_LAYERS, SCHEDULER, FlowFamily, affects_states
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.processors import text_processor
from diffgraft.bases.qwen_vae import QwenVaeFamily
from diffgraft.bases.shape_table import ShapeTable

_LENGTH = 512
"""Tokens of a prompt at most, with those of its template that are not dropped"""
_ON_META = "_masks_are_moved_to_meta"
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_ENDS = (
    *("img_in", "txt_in.text_norm", "txt_in.in_layer", "txt_in.out_layer", "modulation.1"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
    *("norm_out.linear", "proj_out"),
)
_ORIGINAL = OriginalLayout(
    {
        ("", ""): {name: name for name in _ENDS},
        ("transformer_blocks.*.",) * 2: {
            **{name: name for name in (*_ATTENTION, "attn.norm_q", "attn.norm_k", "img_mlp.out")},
            "img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj"),
        },
    },
    sizes=frozenset({(4096, 32)}),
)
"""Names in the files for ComfyUI, which are those of diffusers but for a fused layer"""


class QwenImage21(QwenVaeFamily):
    """The family of Qwen-Image 2.1 (Qwen 2026).

    Text and picture are one sequence, in which the position of the picture depends on the length of the text. So no
    prompt is padded for the transformer: it runs once for each length of a prompt in a batch.
    """

    name = "qwen-image-21"
    pipeline_class = "QwenImage21Pipeline"
    guidance = 1.0
    text = (TextSlot("text_encoder", "tokenizer"),)
    components = {  # noqa: RUF012
        "transformer": Component("diffusers", ("QwenImage21Transformer2DModel",)),
        "vae": Component("diffusers", ("AutoencoderKLQwenImage21",)),
        "scheduler": SCHEDULER,
        "text_encoder": Component("transformers", ("Qwen3VLForConditionalGeneration",)),
        "processor": Component("transformers", ("Qwen3VLProcessor",)),
    }
    layers = {  # noqa: RUF012
        "transformer": {
            "attention": _ATTENTION,
            "feedforward": ("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
            "modulation": ("modulation.1",),
        },
        "text_encoder": QWEN_LAYERS,
    }
    checkpointed = ("QwenImage21TransformerBlock",)
    original = _ORIGINAL
    published = "Qwen/Qwen-Image-2.1"
    unsupported = {  # noqa: RUF012
        **FlowFamily.unsupported,
        "attention": "diffusers computes its attention in one way only",
    }

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return depth and widths."""
        head = max(1, shapes.size("transformer_blocks.0.attn.norm_q.weight"))
        width = max(1, shapes.size("img_in.weight"))
        return {
            "patch_size": 1,
            "in_channels": shapes.size("img_in.weight", 1),
            "out_channels": shapes.size("proj_out.weight"),
            "num_layers": shapes.count("transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "context_in_dim": shapes.size("txt_in.in_layer.weight", 1),
            "mlp_ratio": shapes.size("transformer_blocks.0.img_mlp.proj.weight") // width,
        }

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """Compare latents, and the states of Qwen3-VL."""
        config = parts["transformer"].config
        yield "latents", config.in_channels, parts["vae"].config.z_dim
        yield "states of text", config.context_in_dim, parts["text_encoder"].config.get_text_config().hidden_size

    def size_shift(self, base: Base, tokens: int, steps: int) -> float:
        """Return μ for a picture of `tokens` squares of 2 × 2 latents, each of which is a token here."""
        return super().size_shift(base, 4 * tokens, steps)

    def timestep_shift(self, base: Base, height: int, width: int) -> float:
        """Return eᵘ, where u is linear in the number of latents."""
        return math.exp(self.size_shift(base, height // 2 * (width // 2), 1))

    def posterior(self, base: Base, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures [n, 3, height, width], which are opaque, to mean and standard deviation of their latents."""
        return super().posterior(base, torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1))

    def decode(self, base: Base, latents: Tensor) -> Tensor:
        """Decode latents [n, c, h, w] to pictures [n, 3, height, width], without their alpha channel."""
        return super().decode(base, latents)[:, :3]

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:  # noqa: ARG002
        """Return states of the prompt, [n, 512, width], padded with zeros, and a mask of its tokens.

        They are those after the last layer and before the final norm, as in the model's training. The prompt is put
        into the model's own template, whose beginning is dropped. Of longer prompts the end is.
        """
        template, tokenizer = base.pipeline().prompt_template_t2i, base.tokenizer
        before, after = template.split("{}")
        dropped = len(tokenizer(before.partition("<|im_start|>user")[0]).input_ids)
        end, length = tokenizer(after).input_ids, dropped + _LENGTH
        rows = [tokenizer(template.format(prompt or " ")).input_ids for prompt in prompts]
        rows = [row if len(row) <= length else [*row[: length - len(end)], *end] for row in rows]
        padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        ids = torch.tensor(padded, device=base.device)
        mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows], device=base.device)
        # the library looks into a mask of two axes, which has no values on `meta`
        seen = mask.new_empty(len(mask), 1, length, length) if mask.is_meta else mask.long()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        states: list[Tensor] = []
        norm = base.text_encoder.model.language_model.norm
        hook = norm.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))  # noqa: ARG005
        try:
            base.text_encoder.model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False)
        finally:
            hook.remove()
        kept = mask[:, dropped:]
        return Conditioning(states[0][:, dropped:] * kept.unsqueeze(-1), {"mask": kept})

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        dtype, (height, width) = base.denoiser.dtype, noisy.shape[-2:]
        tokens, states = noisy.to(dtype).flatten(2).transpose(1, 2), conditioning.hidden_states.to(dtype)
        sigmas = self.sigmas(base, timesteps, noisy)
        groups = _by_length(conditioning.added["mask"])
        if noisy.is_meta and not hasattr(denoiser, _ON_META):
            _move_masks_to_meta(denoiser)
        found = []
        for length, rows in groups:
            slots = torch.arange(length + height * width // 4) >= length  # one for the text's tokens, or 2 × 2 latents
            found.append(
                denoiser(
                    hidden_states=tokens[rows],
                    encoder_hidden_states=states[rows, :length],
                    timestep=sigmas[rows],
                    img_shapes=[[(1, height, width)]] * len(rows),
                    img_mask=slots.to("cpu" if noisy.is_meta else noisy.device).expand(len(rows), -1),
                    return_dict=False,
                )[0][:, -height * width :]
            )
        order = [row for _, rows in groups for row in rows]
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(found)[places].transpose(1, 2).reshape(noisy.shape)

    def pipeline(self, base: Base) -> Any:
        """Return diffusers' pipeline of the modules of `base`, which reads prompts and no pictures."""
        import diffusers

        known = getattr(base, "processor", None)
        files = getattr(known, "files", {})
        pipe = diffusers.QwenImage21Pipeline(
            scheduler=type(base.scheduler).from_config(base.scheduler.config),
            processor=text_processor(base.tokenizer, files),
            **dict(base.parts()),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def affects_output(self, base: Base, part: str, path: str) -> bool:
        """Whether the module affects the picture: all of the transformer does; the final norm of Qwen3-VL does not.

        Neither do its parts that read pictures or write text.
        """
        count = base.text_encoder.config.get_text_config().num_hidden_layers
        return part == self.denoiser or (affects_states(path, count, count) and path.rpartition(".")[2] != "norm")


def _by_length(mask: Tensor) -> list[tuple[int, list[int]]]:
    """Return each number of tokens that prompts have, with the prompts that have it, for a mask [n, length].

    Processes that train together run the transformer equally often, once for each prompt, as shards wait for another.
    """
    if mask.is_meta:
        return [(mask.shape[1], list(range(len(mask))))]
    lengths = [int(length) for length in mask.sum(1)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [(length, [row]) for row, length in enumerate(lengths)]
    return [(length, [row for row, own in enumerate(lengths) if own == length]) for length in dict.fromkeys(lengths)]


def _move_masks_to_meta(denoiser: Any) -> None:
    """Let a transformer on the device ``meta`` take a mask of the picture's tokens that has values.

    It reads from them where the picture is, and then chooses its modulation by a mask on the device of the states.
    """

    def move(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(_on_meta, inputs)), {name: _on_meta(value) for name, value in named.items()}

    for module in (*denoiser.transformer_blocks, denoiser.norm_out):
        module.register_forward_pre_hook(move, with_kwargs=True)
    setattr(denoiser, _ON_META, True)


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


FAMILY = QwenImage21()
