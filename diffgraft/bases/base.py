"""A frozen base: the parts of a text-to-image diffusion model, and what one needs to ask of them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.bases.family import Conditioning, Family, LatentSpec, SizeConditioning
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.third_party import quiet_libraries


@dataclass(eq=False, repr=False)
class Base:
    """UNet, text encoder(s), tokenizer(s), VAE and noise schedule of one model, all frozen."""

    name: str
    """What it was loaded from: `tiny`, a hub id, a folder or a file."""
    family: Family
    vae: Any
    scheduler: Any
    unet: Any = None
    transformer: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
    """Networks and tokenizers of other names, as the family has them; they are attributes, too"""
    hash: str = field(init=False)
    """SHA-256 over names, shapes and half-precision values of the UNet and the text encoders, as they were given.

    The same for a model stored in float32 and in float16, whatever the file layout; the VAE, which people exchange
    freely and no adapter touches, is left out. It is taken at once: later, weights may be cast, quantised, merged or
    attached to.
    Outlines, whose weights have no values, have none.
    """
    quantize: str = field(default="none", init=False)
    """How its linear layers are held: `none` as they are, or in `int8` or `nf4`."""

    _grey: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)
    """Size of the latents → those of a grey picture"""

    def __repr__(self) -> str:
        more = (", zero terminal SNR" if self.zero_snr else "") + (", inpainting" if self.is_inpainting else "")
        told = f"family {self.family.name}, predicts {self.prediction_type}{more}"
        dtype = self.denoiser.dtype
        held = dtype if self.quantize == "none" else f"{dtype} and {self.quantize}"
        return f"Base({self.name!r}, {told}, {held} on {self.device})"

    def __post_init__(self) -> None:
        for name, part in self.others.items():
            setattr(self, name, part)
        for _, part in self.parts():
            part.requires_grad_(False).eval()
        is_outline = any(value.is_meta for value in self.denoiser.parameters())
        self.hash = "" if is_outline else _digest((name, part) for name, part in self.parts() if name != "vae")

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of each network there is."""
        for name in (self.family.denoiser, *(slot.component for slot in self.family.text), "vae"):
            part = getattr(self, name, None)
            if part is not None:
                yield name, part

    def tokenizers(self) -> dict[str, Any]:
        """Its tokenizers by name."""
        names = (slot.tokenizer for slot in self.family.text)
        return {name: held for name in names if (held := getattr(self, name, None)) is not None}

    @property
    def denoiser(self) -> Any:
        """The network that predicts noise, velocity or flow."""
        return getattr(self, self.family.denoiser)

    @denoiser.setter
    def denoiser(self, module: Any) -> None:
        setattr(self, self.family.denoiser, module)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Its text encoders by name."""
        names = {slot.component for slot in self.family.text}
        return {name: part for name, part in self.parts() if name in names}

    def pipeline(self) -> Any:
        """A pipeline over these very modules, as diffusers has them: what changes there changes here."""
        return self.family.pipeline(self)

    def condition(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, whole: bool = False
    ) -> Conditioning:
        """What the denoiser is told about `prompts`; `size` is (height, width) in pixels, by default the base's own.

        A prompt that is longer than the text encoder reads is cut, or, if `whole`, read in pieces of that length.
        """
        shown = size or (self.resolution, self.resolution)
        told = self.family.encode(self, prompts, whole)
        return told.with_size(self.family.size_conditioning([SizeConditioning(shown, (0, 0), shown)] * len(prompts)))

    def denoise(self, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        """The prediction [n, c, h, w] for noisy latents [n, c, h, w] at `timesteps` [n], told about n prompts."""
        return self.family.denoise(self, self.denoiser, noisy, timesteps, told)

    @property
    def is_inpainting(self) -> bool:
        """Whether the denoiser is told, beside the noisy latents, where to draw and what stays."""
        channels = getattr(self.denoiser.config, "in_channels", 0)
        return self.family.denoiser == "unet" and bool(channels > self.vae.config.latent_channels)

    def denoiser_input(self, noisy: Tensor) -> Tensor:
        """What the denoiser takes for noisy latents [n, c, h, w]: one for inpainting [n, 2 · c + 1, h, w].

        That is told to draw everything: a mask of ones, and the latents of a picture of which nothing is left, which
        is grey, as in the training of Stable Diffusion's inpainting models.
        """
        noisy = noisy.to(self.denoiser.dtype)
        if not self.is_inpainting:
            return noisy
        size = tuple(noisy.shape[-2:])
        if size not in self._grey:
            with torch.no_grad():
                blank = torch.zeros(1, 3, *(side * self.vae_scale_factor for side in size))
                latents = self.vae.encode(blank.to(self.device, self.vae.dtype)).latent_dist.mode()
            self._grey[size] = self.scaled(latents)
        grey = self._grey[size].to(noisy).expand(len(noisy), -1, -1, -1)
        return torch.cat([noisy, torch.ones_like(noisy[:, :1]), grey], 1)

    @property
    def latents(self) -> LatentSpec:
        """Channels and scale of its latents."""
        return self.family.latents(self)

    def scaled(self, encoded: Tensor) -> Tensor:
        """Latents of what the autoencoder encodes, in the scale that the denoiser takes."""
        spec = self.latents
        return (encoded - spec.shift if spec.shift else encoded) * spec.scale

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the base was made for."""
        return self.family.native_size(self) * self.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: `epsilon`, `v_prediction` or `flow`."""
        return self.parameterization.name

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """The options of `wanted` (`LoadOptions`) with which the base was not loaded, as key=value."""
        own = {"prediction_type": self.parameterization.name, "zero_snr": self.zero_snr, "quantize": self.quantize}
        return [f"{key}={value}" for key, value in wanted.items() if value not in (None, "none", own[key])]

    @property
    def parameterization(self) -> Parameterization:
        """What the denoiser predicts, on the schedule it was trained with."""
        return self.family.parameterization(self.scheduler)

    @property
    def zero_snr(self) -> bool:
        """Whether the noise schedule ends in pure noise."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr"))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device
        return device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Base":
        """Move all parts, in place."""
        with quiet_libraries():
            for _, part in self.parts():
                part.to(device=device, dtype=dtype)
        return self

    @property
    def vae_hash(self) -> str:
        """SHA-256 over names, shapes and values of the VAE, as they are now."""
        return _digest([("vae", self.vae)], torch.float32)

    @property
    def generation_hash(self) -> str:
        """SHA-256 over all that decides what the base draws: `hash`, `quantize`, the VAE and the noise schedule."""
        # keys with an underscore are diffusers' notes to itself, and differ from process to process
        schedule = sorted((key, value) for key, value in self.scheduler.config.items() if not key.startswith("_"))
        said = f"{self.hash} {_digest([('vae', self.vae)])} {type(self.scheduler).__name__} {schedule}"
        said += f" {self.quantize}" if self.quantize != "none" else ""
        return hashlib.sha256(said.encode()).hexdigest()


def _digest(parts: Iterable[tuple[str, nn.Module]], dtype: torch.dtype = torch.float16) -> str:
    digest = hashlib.sha256()
    for part_name, part in parts:
        for name, value in sorted(part.named_parameters()):
            # transformers has dropped the level `text_model`; the weights are the same
            digest.update(f"{part_name}.{name.removeprefix('text_model.')} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().to(dtype).contiguous().numpy().tobytes())
    return digest.hexdigest()
