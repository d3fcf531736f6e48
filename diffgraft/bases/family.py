"""The contract of a family of bases: everything that is architecture, in one object for each.

A new family is one module of `diffgraft.bases.families`, or of an outside package that names it in the entry-point
group ``diffgraft.families``. It holds ``FAMILY``, an instance of a subclass of `Family`. Nothing outside `bases` and
`adapters.formats` may assume a kind of denoiser, text encoder, prediction or noise schedule: it asks the family.

Who calls what: loading asks `matches`; text encoding `encode` and `size_conditioning`; every training step and the
measurements `denoise`; the loss `parameterization`; attaching adapters `layers`; strengths and learning rates `blocks`;
estimates, shards and checkpointing `checkpointed`; `train` and `plan` refuse what is in `unsupported`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from diffgraft.diffusion.parameterizations import Parameterization

if TYPE_CHECKING:
    from diffgraft.bases.base import Base

GROUP = "diffgraft.families"
"""Entry-point group in which outside packages name their families"""


class SizeConditioning(NamedTuple):
    """How a picture was scaled and cropped, in pixels, for denoisers that are told."""

    original: tuple[int, int]
    """(height, width) before it was scaled"""
    corner: tuple[int, int]
    """(top, left) of the crop, in the scaled picture"""
    shown: tuple[int, int]
    """(height, width) of the crop"""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the noisy latents and the timestep, for n prompts."""

    hidden_states: Tensor
    """[n, tokens, width], for the cross-attention"""
    added: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors by name, each [n, …], as the family's `Family.denoise` takes them"""

    def with_size(self, more: Mapping[str, Tensor]) -> "Conditioning":
        """The same with the tensors of `Family.size_conditioning` added, on the device of the states."""
        device = self.hidden_states.device
        return Conditioning(self.hidden_states, {**self.added, **{name: at.to(device) for name, at in more.items()}})


@dataclass(frozen=True)
class LatentSpec:
    """How latents are made of what the autoencoder encodes: (encoded − shift) · scale."""

    channels: int
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class TextSlot:
    """A text encoder of a family."""

    component: str
    """Name of the encoder, in pipelines, strengths and adapter paths: `text_encoder`"""
    tokenizer: str
    """Name of its tokenizer: `tokenizer`"""
    single_file_prefix: str = ""
    """What the names of its weights begin with in single-file checkpoints; empty where there are none"""


class Family(ABC):
    """An architecture of bases; each is one file in `diffgraft.bases.families`."""

    name: str
    """Short name, as it stands in the header of adapter files"""
    pipeline_class: str = ""
    """Name of the diffusers pipeline that draws with such a base; empty where `pipeline` is overridden"""
    denoiser: str
    """Component that denoises, which is also its prefix in adapter paths and its name in strengths: `unet`"""
    text: Sequence[TextSlot]
    """Its text encoders, in order"""
    layers: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Component → group (`attention`, `feedforward`, `convolution`) → what the paths of its layers end in"""
    blocks: bool = False
    """Whether the denoiser has the block names IN00 … M00 … OUT11; without them strengths know BASE alone"""
    checkpointed: tuple[str, ...] = ()
    """Classes of the denoiser's blocks, for gradient checkpointing, its memory estimate and shards"""
    unsupported: Mapping[str, str] = {}
    """Keys of recipes that have no meaning for this family → why; ``train`` and ``plan`` refuse them by name"""

    @abstractmethod
    def matches(self, pipe: Any) -> bool:
        """Whether a loaded diffusers pipeline is of this family, and of no other."""

    @abstractmethod
    def parameterization(self, scheduler: Any) -> Parameterization:
        """What the denoiser predicts, on the schedule of a diffusers `scheduler`."""

    @abstractmethod
    def encode(self, base: "Base", prompts: Sequence[str], whole: bool) -> Conditioning:
        """What the denoiser is told about n `prompts`, of each only what fits the tokenizer, or the `whole` in pieces.

        Shapes: hidden states [n, tokens, width] on the base's device.
        """

    @abstractmethod
    def denoise(
        self, base: "Base", denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: Conditioning
    ) -> Tensor:
        """The prediction [n, c, h, w] for noisy latents [n, c, h, w] at `timesteps` [n].

        Args:
            base: whose denoiser it is.
            denoiser: `base.denoiser`, or a compiled or sharded copy of it.
            noisy: of the family's forward process.
            timesteps: indices into the schedule of `parameterization`.
            told: of `encode` and `size_conditioning`, for n prompts.
        """

    def size_conditioning(self, frames: Sequence[SizeConditioning]) -> dict[str, Tensor]:  # noqa: ARG002
        """What the denoiser is told about how n pictures were cropped, [n, …] by name; empty: it is told nothing."""
        return {}

    def affects_output(self, base: "Base", part: str, path: str) -> bool:  # noqa: ARG002
        """Whether the output of the module at `path` of the text encoder `part` reaches the denoiser."""
        return True

    def latents(self, base: "Base") -> LatentSpec:
        """The latents of its autoencoder."""
        config = base.vae.config
        return LatentSpec(int(config.latent_channels), config.scaling_factor, getattr(config, "shift_factor", 0) or 0.0)

    def native_size(self, base: "Base") -> int:
        """Side in latents of the pictures that the denoiser was made for."""
        return int(base.denoiser.config.sample_size)

    def header(self, base: "Base") -> dict[str, Any]:  # noqa: ARG002
        """What an adapter's header says of the base's topology, where names in files depend on it."""
        return {}

    def timing_block(self, base: "Base") -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        """A part of the denoiser to measure the device's speed on.

        Returns:
            The block, the shapes of its keyword arguments, and the channels of its input [1, channels, side, side].
        """
        raise NotImplementedError(f"the family {self.name} names no block to measure")

    def set_attention(self, denoiser: Any, kind: str) -> None:
        """Compute the denoiser's attentions as a recipe's ``attention`` says; a family without it is `unsupported`."""
        raise NotImplementedError(f"the family {self.name} has no other ways to compute attention ({kind})")

    def pipeline(self, base: "Base") -> Any:
        """A pipeline over the modules of `base`: called with prompts it draws, as diffusers' pipelines do."""
        import diffusers

        shared: dict[str, Any] = dict(base.parts()) | base.tokenizers()
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        pipe = getattr(diffusers, self.pipeline_class)(scheduler=scheduler, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def single_file_prefixes(self) -> dict[str, str]:
        """Text encoder → what the names of its weights begin with in single-file checkpoints; empty without such."""
        return {slot.component: slot.single_file_prefix for slot in self.text if slot.single_file_prefix}
