"""A frozen base: the parts of a text-to-image diffusion model, and what one needs to ask of them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.quiet import hushed

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The networks of a base that adapters change."""


class Family(Protocol):
    """What differs between the families of bases; each is one file beside this one."""

    name: str
    """Short name, as it stands in the header of adapter files."""
    pipeline_class: str
    """Name of the diffusers pipeline that draws with such a base."""
    in_single_files: Mapping[str, str]
    """Text encoder → what the names of its weights begin with in single-file checkpoints; empty where there are none"""

    def holds(self, pipe: Any) -> bool:
        """Whether a loaded diffusers pipeline is of this family."""

    def condition(self, base: "Base", prompts: Sequence[str], whole: bool) -> "Conditioning":
        """What the UNet is told about `prompts`, of each only what fits the tokenizer, or the `whole` in pieces."""

    def framing(self, frames: Sequence["Framing"]) -> dict[str, Tensor]:
        """What it is told about how n pictures are cut, as `Conditioning.added`; empty where it is told nothing."""

    def parameterization(self, scheduler: Any) -> Parameterization:
        """What the denoiser predicts, on the schedule of a diffusers scheduler."""

    def reaches(self, base: "Base", part: str, path: str) -> bool:
        """Whether what the module at `path` of a text encoder computes reaches the UNet at all."""


class Framing(NamedTuple):
    """How a picture was cut, in pixels."""

    original: tuple[int, int]
    """(height, width) before it was scaled"""
    corner: tuple[int, int]
    """(top, left) of what is shown, in the scaled picture"""
    shown: tuple[int, int]
    """(height, width) of what is shown"""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside the noisy latents and the timestep, for n prompts."""

    hidden_states: Tensor
    """[n, tokens, width], for the cross-attention."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors, each [n, …], that the family's UNet takes as `added_cond_kwargs`."""

    def framed(self, more: Mapping[str, Tensor]) -> "Conditioning":
        """The same with `Family.framing`'s tensors added, where the states are."""
        device = self.hidden_states.device
        return Conditioning(self.hidden_states, {**self.added, **{name: at.to(device) for name, at in more.items()}})

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the UNet's call."""
        more = {"added_cond_kwargs": self.added} if self.added else {}
        return {"encoder_hidden_states": self.hidden_states, **more}


@dataclass(eq=False, repr=False)
class Base:
    """UNet, text encoder(s), tokenizer(s), VAE and noise schedule of one model, all frozen."""

    name: str
    """What it was loaded from: `tiny`, a hub id, a folder or a file."""
    family: Family
    unet: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
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
        held = self.unet.dtype if self.quantize == "none" else f"{self.unet.dtype} and {self.quantize}"
        return f"Base({self.name!r}, {told}, {held} on {self.device})"

    def __post_init__(self) -> None:
        for _, part in self.parts():
            part.requires_grad_(False).eval()
        is_outline = any(value.is_meta for value in self.unet.parameters())
        self.hash = "" if is_outline else _digest((name, part) for name, part in self.parts() if name != "vae")

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of each network there is."""
        for name in (*PARTS, "vae"):
            part = getattr(self, name)
            if part is not None:
                yield name, part

    def pipeline(self) -> Any:
        """A diffusers pipeline over these very modules: what changes there changes here."""
        import diffusers

        shared: dict[str, Any] = dict(self.parts())
        shared |= {name: getattr(self, name) for name in ("tokenizer", "tokenizer_2") if getattr(self, name)}
        if self.family.pipeline_class == "StableDiffusionPipeline":  # of inpainting, too
            shared |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        kind = self.family.pipeline_class
        pipe = getattr(diffusers, inpainting(kind) if self.is_inpainting else kind)(scheduler=scheduler, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def condition(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, whole: bool = False
    ) -> Conditioning:
        """What the UNet is told about `prompts`; `size` is (height, width) in pixels, by default the base's own.

        A prompt that is longer than the text encoder reads is cut, or, if `whole`, read in pieces of that length.
        """
        shown = size or (self.resolution, self.resolution)
        told = self.family.condition(self, prompts, whole)
        return told.framed(self.family.framing([Framing(shown, (0, 0), shown)] * len(prompts)))

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet is told, beside the noisy latents, where to draw and what stays."""
        return bool(self.unet.config.in_channels > self.vae.config.latent_channels)

    def unet_input(self, noisy: Tensor) -> Tensor:
        """What the UNet takes for noisy latents [n, c, h, w]: of an inpainting UNet [n, 2 · c + 1, h, w].

        That is told to draw everything: a mask of ones, and the latents of a picture of which nothing is left, which
        is grey, as in the training of Stable Diffusion's inpainting models.
        """
        noisy = noisy.to(self.unet.dtype)
        if not self.is_inpainting:
            return noisy
        size = tuple(noisy.shape[-2:])
        if size not in self._grey:
            with torch.no_grad():
                blank = torch.zeros(1, 3, *(side * self.factor for side in size))
                latents = self.vae.encode(blank.to(self.device, self.vae.dtype)).latent_dist.mode()
            self._grey[size] = latents * self.vae.config.scaling_factor
        grey = self._grey[size].to(noisy).expand(len(noisy), -1, -1, -1)
        return torch.cat([noisy, torch.ones_like(noisy[:, :1]), grey], 1)

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the base was made for."""
        return int(self.unet.config.sample_size * self.factor)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: `epsilon` or `v_prediction`."""
        return str(self.scheduler.config.prediction_type)

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
        device: torch.device = self.unet.device
        return device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Base":
        """Move all parts, in place."""
        with hushed():
            for _, part in self.parts():
                part.to(device=device, dtype=dtype)
        return self

    @property
    def vae_hash(self) -> str:
        """SHA-256 over names, shapes and values of the VAE, as they are now."""
        return _digest([("vae", self.vae)], torch.float32)

    @property
    def drawing_hash(self) -> str:
        """SHA-256 over all that decides what the base draws: `hash`, `quantize`, the VAE and the noise schedule."""
        # keys with an underscore are diffusers' notes to itself, and differ from process to process
        schedule = sorted((key, value) for key, value in self.scheduler.config.items() if not key.startswith("_"))
        said = f"{self.hash} {_digest([('vae', self.vae)])} {type(self.scheduler).__name__} {schedule}"
        said += f" {self.quantize}" if self.quantize != "none" else ""
        return hashlib.sha256(said.encode()).hexdigest()


def inpainting(pipeline_class: str) -> str:
    """Name of diffusers' pipeline for inpainting UNets of a family, from that of its own."""
    return pipeline_class.replace("Pipeline", "InpaintPipeline")


def _digest(parts: Iterable[tuple[str, nn.Module]], dtype: torch.dtype = torch.float16) -> str:
    digest = hashlib.sha256()
    for part_name, part in parts:
        for name, value in sorted(part.named_parameters()):
            # transformers has dropped the level `text_model`; the weights are the same
            digest.update(f"{part_name}.{name.removeprefix('text_model.')} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().to(dtype).contiguous().numpy().tobytes())
    return digest.hexdigest()
