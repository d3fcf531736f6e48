"""Base class of the families whose denoiser is a transformer that predicts the flow, ε − x₀."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffgraft.bases.base import Base
from diffgraft.bases.family import Component, Family
from diffgraft.diffusion.parameterizations import Flow, Parameterization
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries

SCHEDULER = Component("diffusers", ("FlowMatchEulerDiscreteScheduler",))
KL_VAE = Component("diffusers", ("AutoencoderKL",))
CLIP_LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "feedforward": ("fc1", "fc2"),
}
JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Layers of attention over text and picture together: those of the picture, and those of the text"""
FLUX_ATTENTION: Mapping[str, str | tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
}
"""Attention in the double blocks of FLUX: name in the original layout → name in diffusers, or those of its parts"""
FLUX_SCALES = frozenset(
    f"{block}norm.{norm}_norm"
    for block in ("double_blocks.*.img_attn.", "double_blocks.*.txt_attn.", "single_blocks.*.")
    for norm in ("query", "key")
)
"""Norms of FLUX whose weight is named ``scale`` in the original layout"""
QWEN_LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feedforward": ("gate_proj", "up_proj", "down_proj"),
}
T5_LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
    "feedforward": ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),
}
BUNDLED_VAE = ("first_stage_model.", "vae.")
"""Prefixes of a VAE's weights in files that hold it beside a transformer"""
_LANGUAGE_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_OUTSIDE = ("lm_head", "visual.", "model.visual.")
"""Beginnings of paths in a language model that have no part in the hidden states of a text"""
QWEN_TOKENIZER = Component("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast"))
_ALMOST_NOISE = 1 - 2.0**-12
"""Largest σ that samplers use; at σ = 1 the level σ / (1 − σ) would be infinite"""
_NATIVE_PIXELS = 1024


class FlowFamily(Family):
    """A family whose denoiser is a diffusers transformer, trained by flow matching (Esser et al. 2024, section 2)."""

    denoiser = "transformer"
    patch = 2
    guidance = 4.0
    unsupported: Mapping[str, str] = {
        "channels_last": "a transformer has no convolutions that it would speed up",
        "prediction_type": "it predicts the flow",
        "zero_snr": "its schedule ends in pure noise",
        "loss.snr_gamma": "min-SNR weighting is undefined for flow matching",
        "loss.debiased": "debiased estimation is undefined for flow matching",
        "noise.offset": "pure noise is part of its schedule, so that brightness needs no offset",
        "noise.pyramid": "its forward process has noise of unit variance",
    }

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline is of the class that the family loads."""
        return type(pipe).__name__ == self.pipeline_class

    def parameterization(self, scheduler: Any) -> Parameterization:
        """Return the flow, with the scheduler's constant shift; shifts by the size of a picture are for drawing."""
        config = scheduler.config
        return Flow(config.num_train_timesteps, 1.0 if config.use_dynamic_shifting else config.shift)

    def sigmas(self, base: Base, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return σ [n] at `timesteps` [n], with the dtype and device of `like`; between two timesteps, interpolated."""
        table = base.parameterization.sigmas.to(like.device, torch.float32)
        low = timesteps.long()
        high = (low + 1).clamp_max(len(table) - 1)
        return torch.lerp(table[low], table[high], (timesteps - low).to(table)).to(like)

    def size_shift(self, base: Base, tokens: int, steps: int) -> float:  # noqa: ARG002
        """Return μ, the logarithm of the shift for drawing a picture of `tokens` patches in `steps`."""
        return _linear_shift(base.scheduler.config, tokens)

    def timestep_shift(self, base: Base, height: int, width: int) -> float:
        """Return eᵘ, where u is linear in the number of patches.

        The ends of the line are those of the scheduler's configuration: for FLUX.1, 0.5 for 256 patches and 1.15 for
        4096 (Black Forest Labs' code, ``sampling.py``, and sd-scripts' ``--timestep_sampling flux_shift``).
        """
        return math.exp(_linear_shift(base.scheduler.config, (height // self.patch) * (width // self.patch)))

    def sampling_sigmas(self, base: Base, tokens: int, steps: int) -> list[float] | None:
        """Return the noise levels of the family's pipeline in diffusers, computed by its scheduler."""
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        shift = {"mu": self.size_shift(base, tokens, steps)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), **shift)
        return levels(scheduler.sigmas)

    def native_size(self, base: Base) -> int:
        """Return the native side of pictures in latents: that of the configuration, else of 1024 pixels."""
        side = getattr(base.denoiser.config, "sample_size", None)
        return int(side or _NATIVE_PIXELS // self.pixels_per_latent(base))

    def schedule_timesteps(self, inputs: Tensor) -> Tensor:
        """Return 1000 · σ, where `inputs` [n] is σ."""
        return 1000 * inputs

    def set_attention(self, denoiser: Any, kind: str) -> Callable[[], None]:
        """Set the kernel of attention: ``plain`` for PyTorch's own products, or ``xformers``.

        Raises:
            DiffgraftError: `kind` is ``sliced``, which only UNets support.
        """
        if kind == "sliced":
            raise DiffgraftError(
                f"attention=sliced has no meaning for bases of the family {self.name}: set attention=default, which "
                "needs as little memory."
            )
        with quiet_libraries():
            denoiser.set_attention_backend({"plain": "_native_math"}.get(kind, kind))

        def set_back() -> None:
            with quiet_libraries():
                denoiser.reset_attention_backend()

        return set_back

    def block_for_timing(self, base: Base) -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        """Return a layer that mixes channels as those of a transformer do, for latents of the base."""
        channels = base.latents.channels
        width = max(layer.out_features for layer in base.denoiser.modules() if isinstance(layer, nn.Linear))
        return nn.Conv2d(channels, width, 1, device="meta", dtype=base.denoiser.dtype), {}, channels


def _linear_shift(config: Any, tokens: int) -> float:
    """Return the value at `tokens` of the line between the two points of a scheduler's configuration.

    Where the configuration has none, they are those of FLUX.1.
    """
    low, high = config.base_image_seq_len or 256, config.max_image_seq_len or 4096
    first = 0.5 if config.base_shift is None else config.base_shift
    last = 1.15 if config.max_shift is None else config.max_shift
    return float(first + (last - first) / (high - low) * (tokens - low))


def levels(sigmas: Tensor) -> list[float]:
    """Return the noise levels σ / (1 − σ) in the convention x₀ + level · ε for σ of flow matching, [steps + 1]."""
    bounded = sigmas.double().clamp_max(_ALMOST_NOISE)
    return [float(level) for level in bounded / (1 - bounded)]


def language_states(
    base: Base, texts: Sequence[str], length: int, side: str | None = None
) -> tuple[Sequence[Tensor], Tensor]:
    """Run a language model on n texts, padded or truncated to `length` tokens.

    Args:
        base: base with a language model as its only text encoder.
        texts: n texts, with the model's own words around the prompts.
        length: number of tokens.
        side: side of the padding, ``left`` or ``right``; None: that of the tokenizer's configuration.

    Returns:
        Hidden states [n, length, width] before the first layer and after each, and a mask [n, length] of the tokens
        that are no padding. On the device ``meta``, the mask is on the processor, as lengths of texts depend on it.
    """
    padding = {"padding": "max_length", "max_length": length, "padding_side": side}
    ids = base.tokenizer(list(texts), **padding, truncation=True, return_tensors="pt")
    mask, seen = ids.attention_mask, ids.attention_mask.to(base.device)
    if seen.is_meta:  # the library looks into a mask of two axes, which has no values there
        seen = seen.new_empty(len(seen), 1, length, length, dtype=base.text_encoder.dtype)
    else:
        mask = seen
    out = base.text_encoder(ids.input_ids.to(base.device), seen, output_hidden_states=True, use_cache=False)
    return out.hidden_states, mask.bool()


def affects_states(path: str, used: int, count: int) -> bool:
    """Whether the module at `path` in a language model affects its hidden states after `used` of `count` layers.

    The states after the last layer are those after the final norm.
    """
    if path.startswith(_OUTSIDE):
        return False
    layer = _LANGUAGE_LAYER.match(path)
    if layer:
        return int(layer[1]) < used
    return used == count or path.rpartition(".")[2] != "norm"


def as_message(base: Base, prompt: str, *, thinking: bool) -> str:
    """Return a prompt as the user's message in the tokenizer's chat template, up to where the answer begins."""
    text: str = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


def packed(latents: Tensor) -> Tensor:
    """Return latents [n, c, h, w] as tokens [n, h / 2 · w / 2, 4 · c], each of 2 × 2 latents."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens [n, h / 2 · w / 2, 4 · c] as latents [n, c, h, w]: the inverse of `packed`."""
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2)
    return nn.functional.pixel_shuffle(grid, 2)


def grid_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return the positions of height × width tokens, [height · width, 3]: 0, row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)
