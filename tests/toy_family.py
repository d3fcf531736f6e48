"""A family of its own kind, as an outside package would bring it: a small transformer that matches a flow.

It has a prefix of its own, `mixer`, no convolutions and no block names; text encoder and autoencoder are the embedded
base's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from diffgraft import plugins
from diffgraft.bases import Base, Conditioning, Family, load_base
from diffgraft.bases.family import GROUP, TextSlot
from diffgraft.bases.registry import families
from diffgraft.bases.tokens import token_ids
from diffgraft.diffusion.parameterizations import Flow, Parameterization

SHIFT = 3.0
_TEXT = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "feedforward": ("fc1", "fc2"),
}


class Attention(nn.Module):
    """Latents look at one another and at the text."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.add_k, self.add_v = nn.Linear(text, width), nn.Linear(text, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        keys = torch.cat([self.to_k(x), self.add_k(text)], 1)
        values = torch.cat([self.to_v(x), self.add_v(text)], 1)
        out: Tensor = self.to_out[0](nn.functional.scaled_dot_product_attention(self.to_q(x), keys, values))
        return out


class MixerBlock(nn.Module):
    """Attention and a feed-forward network, both added."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width, text)
        self.fc_in, self.fc_out = nn.Linear(width, 2 * width + 4), nn.Linear(2 * width + 4, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x), text)
        out: Tensor = x + self.fc_out(torch.nn.functional.gelu(self.fc_in(x)))
        return out


class Mixer(nn.Module):
    """Patches of 2 × 2 latents as tokens, the timestep added to them."""

    def __init__(self, channels: int, text: int, width: int = 20, side: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=side)
        self.embed = nn.Linear(4 * channels, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(MixerBlock(width, text) for _ in range(2))
        self.head = nn.Linear(width, 4 * channels)
        self.is_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def enable_gradient_checkpointing(self, _: object = None) -> None:
        self.is_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.is_checkpointing = False

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        x = nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
        x = self.embed(x) + self.time(sigma.view(-1, 1, 1).to(x))
        for block in self.blocks:
            if self.is_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, text, use_reentrant=False)
            else:
                x = block(x, text)
        out = self.head(x).transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return nn.functional.pixel_shuffle(out, 2)


class MixerFamily(Family):
    """A transformer that predicts the flow, told about prompts by CLIP."""

    name = "mixer"
    denoiser = "mixer"
    text = (TextSlot("text_encoder", "tokenizer"),)
    layers = {  # noqa: RUF012
        "mixer": {
            "context": ("add_k", "add_v"),
            "attention": ("to_q", "to_k", "to_v", "add_k", "add_v", "to_out.0"),
            "feedforward": ("fc_in", "fc_out"),
        },
        "text_encoder": _TEXT,
    }
    checkpointed = ("MixerBlock",)
    unsupported = {  # noqa: RUF012
        "attention": "its attention is computed in one way",
        "channels_last": "it has no convolutions",
        "prediction_type": "it predicts the flow",
        "zero_snr": "its schedule begins at pure noise",
        "loss.snr_gamma": "min-SNR weighting is undefined for flow matching",
        "loss.debiased": "debiased estimation is undefined for flow matching",
    }

    def matches(self, pipe: Any) -> bool:
        return isinstance(pipe, MixerPipeline)

    def parameterization(self, scheduler: Any) -> Parameterization:
        return Flow(scheduler.config.num_train_timesteps, scheduler.config.shift)

    def encode(self, base: Base, prompts: Sequence[str], whole: bool) -> Conditioning:
        ids = token_ids(base.tokenizer, prompts, whole).to(base.device)
        return Conditioning(base.text_encoder(ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2]).flatten(1, 2))

    def denoise(
        self, base: Base, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        table, low = base.parameterization.sigmas.to(noisy), timesteps.long()
        high = (low + 1).clamp_max(len(table) - 1)
        sigmas = torch.lerp(table[low], table[high], (timesteps - low).to(noisy))
        prediction: Tensor = denoiser(noisy.to(base.denoiser.dtype), sigmas, conditioning.hidden_states)
        return prediction

    def block_for_timing(self, base: Base) -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        channels = base.latents.channels
        return nn.Conv2d(channels, 20, 2, 2, device="meta"), {}, channels

    def pipeline(self, base: Base) -> Any:
        return MixerPipeline(base)


class MixerPipeline:
    """Draws by Euler's method from noise to latents, as diffusers' pipelines are called."""

    def __init__(self, base: Base) -> None:
        self.base, self.mixer, self.vae = base, base.denoiser, base.vae
        self.text_encoder, self.tokenizer = base.text_encoder, base.tokenizer
        self.scheduler, self.vae_scale_factor = base.scheduler, base.vae_scale_factor

    def remove_all_hooks(self) -> None:
        """It has none."""

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        num_inference_steps: int,
        generator: Sequence[torch.Generator],
        callback_on_step_end: Callable[..., Any],
        width: int,
        height: int,
        **_: Any,
    ) -> Any:
        size = (self.base.latents.channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        x = torch.stack([torch.randn(size, generator=own) for own in generator])
        told = self.base.condition(list(prompts))
        places = torch.linspace(999, 0, num_inference_steps + 1).long()
        sigmas = self.base.parameterization.sigmas
        for step, (now, after) in enumerate(pairwise(places)):
            x = x + (sigmas[after] - sigmas[now]) * self.base.denoise(x, now.repeat(len(x)), told)
            callback_on_step_end(self, step, now, {"latents": x})
        decoded = self.vae.decode(x / self.base.latents.scale).sample.clamp(-1, 1)
        pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return SimpleNamespace(images=[Image.fromarray(own) for own in pixels])


FAMILY = MixerFamily()


def mixer_base(seed: int = 0) -> Base:
    """A random base of the family."""
    tiny = load_base("tiny")
    torch.manual_seed(seed)
    mixer = Mixer(tiny.latents.channels, tiny.text_encoder.config.hidden_size, side=int(tiny.unet.config.sample_size))
    return Base(
        name="toy-mixer",
        family=FAMILY,
        vae=tiny.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        others={"mixer": mixer},
    )


@contextmanager
def installed() -> Iterator[None]:
    """Within the block the family is found as one of an outside package."""
    real = plugins.entry_points

    def with_toy(*, group: str) -> Any:
        entry = SimpleNamespace(name="mixer", value="tests.toy_family:FAMILY", load=lambda: FAMILY)
        return [*real(group=group), entry] if group == GROUP else real(group=group)

    with patch.object(plugins, "entry_points", with_toy):
        families.cache_clear()
        try:
            yield
        finally:
            families.cache_clear()
