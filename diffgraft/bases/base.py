"""A frozen base: the parts of a text-to-image diffusion model, and their properties."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffgraft.bases.family import Conditioning, Family, LatentSpec, SizeConditioning
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.third_party import quiet_libraries

_LATENT_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Entries of a VAE's configuration by which families scale its latents"""


@dataclass(eq=False, repr=False)
class Base:
    """UNet, text encoder(s), tokenizer(s), VAE and noise schedule of one model, all frozen."""

    name: str
    """Source it was loaded from: `tiny`, a hub id, a folder or a file."""
    family: Family
    vae: Any
    scheduler: Any
    unet: Any = None
    transformer: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    components_from: str = ""
    """Folder or hub id that the other parts are from, if its denoiser is a single file"""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Networks and tokenizers of families with other names → the part; they are set as attributes, too"""
    hash: str = field(init=False)
    """SHA-256 over names, shapes and float16 values of the denoiser and the text encoders.

    It is equal for models stored in float32 and in float16, in any file layout. The VAE is left out, as users exchange
    it freely and no adapter changes it. The hash is computed when the base is created, before weights are cast,
    quantized, merged or attached to; it is empty for bases on the device ``meta``.
    """
    quantize: str = field(default="none", init=False)
    """Quantization of its linear layers: `none`, `fp8`, `int8` or `nf4`"""
    digest: InitVar["Digest | None"] = None
    """Digest over the denoiser, if its weights were cast while they were read"""
    under: str = field(default="", init=False)
    """Hash and strength of the adapter that is merged into it for a training; part of the keys of cached results"""

    computes_on: torch.device | None = field(default=None, init=False)
    """Device on which it computes, if a run moves its parts there one after the other; None: where its denoiser is"""

    _grey: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)
    """Size (height, width) of latents → latents of a grey picture, for inpainting"""
    _schedule: tuple[Any, Parameterization] | None = field(default=None, init=False)
    """Configuration of the scheduler, and the parameterization that was made of it"""

    def __repr__(self) -> str:
        more = (", zero terminal SNR" if self.zero_snr else "") + (", inpainting" if self.is_inpainting else "")
        model = f"family {self.family.name}, predicts {self.prediction_type}{more}"
        dtype = self.denoiser.dtype
        dtypes = dtype if self.quantize == "none" else f"{dtype} and {self.quantize}"
        return f"Base({self.name!r}, {model}, {dtypes} on {self.device})"

    def __post_init__(self, digest: "Digest | None") -> None:
        for name, part in self.others.items():
            setattr(self, name, part)
        for _, part in self.parts():
            part.requires_grad_(False).eval()
        is_meta = any(value.is_meta for value in self.denoiser.parameters())
        hashed = ("vae",) if digest is None else ("vae", self.family.denoiser)
        parts = ((name, part) for name, part in self.parts() if name not in hashed)
        self.hash = "" if is_meta else weights_hash(parts, start=digest)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield name and module of each network: denoiser, text encoders and VAE."""
        conditioners = (slot.component for slot in self.family.conditioners)
        for name in (self.family.denoiser, *(slot.component for slot in self.family.text), *conditioners, "vae"):
            part = getattr(self, name, None)
            if part is not None:
                yield name, part

    def tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers by name."""
        names = (slot.tokenizer for slot in (*self.family.text, *self.family.conditioners))
        return {name: item for name in names if (item := getattr(self, name, None)) is not None}

    @property
    def denoiser(self) -> Any:
        """The network that predicts noise, velocity or flow: UNet or transformer."""
        return getattr(self, self.family.denoiser)

    @denoiser.setter
    def denoiser(self, module: Any) -> None:
        setattr(self, self.family.denoiser, module)

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders by name."""
        names = {slot.component for slot in self.family.text}
        return {name: part for name, part in self.parts() if name in names}

    def prompt_networks(self) -> dict[str, nn.Module]:
        """Return the networks that prompts pass through, by name: text encoders, and what comes before the denoiser.

        Only the text encoders may be trained.
        """
        names = {slot.component for slot in (*self.family.text, *self.family.conditioners)}
        return {name: part for name, part in self.parts() if name in names}

    def pipeline(self) -> Any:
        """Return a diffusers pipeline of these modules; they are shared, not copied."""
        return self.family.pipeline(self)

    def condition(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts to the conditioning of the denoiser.

        Args:
            prompts: n prompts.
            size: (height, width) of the picture in pixels, for families with micro-conditioning; by default the
                base's native size.
            whole: whether prompts beyond the tokenizer's length are read in chunks instead of being truncated.
        """
        size = size or (self.resolution, self.resolution)
        conditioning = self.family.encode(self, prompts, whole)
        sizes = [SizeConditioning(size, (0, 0), size)] * len(prompts)
        return conditioning.with_size(self.family.size_conditioning(sizes))

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the prediction [n, c, h, w] for noisy latents [n, c, h, w] at `timesteps` [n]."""
        return self.family.denoise(self, self.denoiser, noisy, timesteps, conditioning)

    @property
    def is_inpainting(self) -> bool:
        """Whether the denoiser also takes a mask and the latents of the masked picture."""
        channels = getattr(self.denoiser.config, "in_channels", 0)
        return self.family.denoiser == "unet" and bool(channels > self.vae.config.latent_channels)

    def denoiser_input(self, noisy: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the denoiser's input for noisy latents [n, c, h, w]; for inpainting bases it is [n, 2 · c + 1, h, w].

        Without `channels` (a mask and the latents of the masked picture, [n, 1 + c, h, w]) inpainting bases draw the
        whole picture: their mask is all ones, and the masked picture is grey, as in the training of Stable Diffusion's
        inpainting models.
        """
        noisy = noisy.to(self.denoiser.dtype)
        if channels is not None:
            return torch.cat([noisy, channels.to(noisy)], 1)
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
        """Channels of the latents, and their scale and shift."""
        return self.family.latents(self)

    def scaled(self, encoded: Tensor) -> Tensor:
        """Scale and shift latents of the VAE as the denoiser expects them."""
        spec = self.latents
        return (encoded - spec.shift if spec.shift else encoded) * spec.scale

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side, 8 for Stable Diffusion."""
        return self.family.pixels_per_latent(self)

    @property
    def size_step(self) -> int:
        """Number of pixels that both sides of pictures are multiples of, at least 8."""
        return math.lcm(self.vae_scale_factor * self.family.patch, 8)

    @property
    def resolution(self) -> int:
        """Native side of pictures in pixels."""
        return self.family.native_size(self) * self.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        """Prediction of the denoiser: `epsilon`, `v_prediction` or `flow`."""
        return self.parameterization.name

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Return the options of `wanted` (`LoadOptions`) that this base was not loaded with, as "key=value".

        Where its components are from is not compared.
        """
        own = {"prediction_type": self.parameterization.name, "zero_snr": self.zero_snr, "quantize": self.quantize}
        return [f"{key}={wanted[key]}" for key in own if wanted.get(key) not in (None, "none", own[key])]

    @property
    def parameterization(self) -> Parameterization:
        """Prediction and noise schedule that the denoiser was trained with.

        diffusers' schedulers replace their configuration where they change it, and then it is computed anew.
        """
        config = self.scheduler.config
        if self._schedule is None or self._schedule[0] is not config:
            self._schedule = config, self.family.parameterization(self.scheduler)
        return self._schedule[1]

    @property
    def zero_snr(self) -> bool:
        """Whether the noise schedule has zero terminal SNR, that is, ends in pure noise."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr"))

    @property
    def device(self) -> torch.device:
        """Device that computes, where inputs have to be."""
        if self.computes_on is not None:
            return self.computes_on
        first: Tensor | None = next(self.denoiser.parameters(), None)
        if first is not None and not (first.device.type == "cpu" and torch.accelerator.is_available()):
            return first.device
        # diffusers' property also finds weights that are offloaded to the CPU, but it looks at every module
        device: torch.device = self.denoiser.device
        return device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Base":
        """Move or cast all networks in place, and return the base."""
        if dtype is None and device is not None and self._is_on(torch.device(device)):
            return self
        with quiet_libraries():
            for _, part in self.parts():
                part.to(device=device, dtype=dtype)
        return self

    def _is_on(self, device: torch.device) -> bool:
        """Whether all weights are there, where looking takes less time than moving."""
        tensors = (value for _, part in self.parts() for value in chain(part.parameters(), part.buffers()))
        return all(value.device == device for value in tensors)

    @property
    def vae_hash(self) -> str:
        """SHA-256 over everything that affects latents: the VAE's current float32 values, and how they are scaled."""
        digest = new_digest()
        for name, value in sorted(self.vae.named_buffers()):  # FLUX.2 scales its latents by statistics in buffers
            add_to_hash(digest, f"vae.{name}", value, torch.float32)
        scaling = {key: value for key in _LATENT_SCALING if (value := self.vae.config.get(key)) is not None}
        digest.update(repr(scaling).encode())
        return weights_hash([("vae", self.vae)], torch.float32, digest)

    @property
    def generation_hash(self) -> str:
        """SHA-256 over everything that affects pictures of the base: `hash`, `quantize`, VAE and noise schedule."""
        # keys with an underscore are private to diffusers, and differ between processes
        schedule = sorted((key, value) for key, value in self.scheduler.config.items() if not key.startswith("_"))
        key = f"{self.hash} {self.vae_hash} {type(self.scheduler).__name__} {schedule}"
        key += f" {self.quantize}" if self.quantize != "none" else ""
        return hashlib.sha256(key.encode()).hexdigest()


class Digest(Protocol):
    """Protocol of the hash object that `hashlib.sha256` returns."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def weights_hash(
    parts: Iterable[tuple[str, nn.Module]], dtype: torch.dtype = torch.float16, start: Digest | None = None
) -> str:
    """Return the SHA-256 over names, shapes and values, cast to `dtype`, of the parameters of named modules.

    Args:
        parts: name of each network, and the network.
        dtype: dtype of the values that are hashed.
        start: digest over the networks before them, which is continued.
    """
    digest = start or new_digest()
    for part_name, part in parts:
        for name, value in sorted(part.named_parameters()):
            add_to_hash(digest, f"{part_name}.{name}", value, dtype)
    return digest.hexdigest()


def new_digest() -> Digest:
    """Return a digest for `add_to_hash` that has nothing in it."""
    return hashlib.sha256()


def add_to_hash(digest: Digest, name: str, value: Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Add a parameter to a digest; those of a network are added in the order of their names."""
    # newer versions of transformers have no level `text_model`; the weights are the same
    part, _, path = name.partition(".")
    digest.update(f"{part}.{path.removeprefix('text_model.')} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().to(dtype).contiguous().numpy().tobytes())
