"""The contract of a family of bases, which holds everything that depends on the architecture.

A new family is one module of `diffgraft.bases.families`, or of an outside package with an entry point in the group
``diffgraft.families``. The module holds ``FAMILY``, an instance of a subclass of `Family`. Code outside of `bases` and
`adapters.formats` asks the family instead of assuming a kind of denoiser, text encoder, prediction or noise schedule.

Who calls what: loading asks `components`, `conditioners` and `matches`; text encoding `encode` and `size_conditioning`;
latents `posterior` and `decode`; every training step and the measurements `denoise`; the loss `parameterization`;
samplers `sampling_sigmas`; attaching adapters `layers`; strengths and learning rates `blocks`; condition pictures
`control_network`, `empty_control_network` and `picture_layers`; estimates, shards and checkpointing `checkpointed`;
`train` and `plan` refuse what is in `unsupported`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from diffgraft.bases.control import PictureLayer
from diffgraft.bases.modular import pipeline_of
from diffgraft.bases.original_layout import OriginalLayout
from diffgraft.bases.shape_table import ShapeTable
from diffgraft.bases.student import StudentSize
from diffgraft.diffusion.parameterizations import Parameterization
from diffgraft.errors import DiffgraftError

if TYPE_CHECKING:
    from diffgraft.bases.base import Base

GROUP = "diffgraft.families"
"""Entry-point group in which outside packages name their families"""


class SizeConditioning(NamedTuple):
    """Frame of a picture: size and crop in pixels, for denoisers with micro-conditioning such as SDXL's.

    It goes with its sample through every objective, and so does the condition picture of the crop.
    """

    original: tuple[int, int]
    """(height, width) of the picture before scaling"""
    corner: tuple[int, int]
    """(top, left) of the crop in the scaled picture"""
    target: tuple[int, int]
    """(height, width) of the crop"""
    control: Tensor | None = None
    """Condition picture of the crop, [3, height, width] with values from 0 to 1; None without a control network"""


@dataclass(frozen=True)
class ControlSignal:
    """Condition pictures of n samples, and the network that steers the denoiser by them."""

    network: nn.Module
    """Result of `Family.control_network`, or an `InputControl` of layers of `Family.picture_layers`"""
    pictures: Tensor
    """[n, 3, height, width] in pixels, with values from 0 to 1"""
    strength: float = 1.0
    """Factor on what the network adds to the denoiser"""


@dataclass(frozen=True)
class Conditioning:
    """Input of the denoiser beside noisy latents and timesteps: the embeddings of n prompts."""

    hidden_states: Tensor
    """Hidden states of the text encoders, [n, tokens, width], for cross-attention"""
    added: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors [n, …] by name, such as pooled embeddings, as `Family.denoise` takes them"""
    channels: Tensor | None = None
    """Further channels of the denoiser's input [n, c, h, w], such as the mask and picture of an inpainting denoiser"""
    control: ControlSignal | None = None
    """What steers the denoiser by condition pictures; None without a control network"""

    def with_size(self, added: Mapping[str, Tensor]) -> "Conditioning":
        """Return a copy with the tensors of `Family.size_conditioning` added, on the device of the hidden states."""
        device = self.hidden_states.device
        moved = {name: value.to(device) for name, value in added.items()}
        return replace(self, added={**self.added, **moved})


@dataclass(frozen=True)
class LatentSpec:
    """Channels of latents, and their scaling: (encoded − shift) · scale, where `encoded` comes from the VAE."""

    channels: int
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class TextSlot:
    """A text encoder of a family: the names of its component, its tokenizer and its weights in files."""

    component: str
    """Name of the encoder in pipelines, strengths and adapter paths, such as `text_encoder`"""
    tokenizer: str
    """Name of its tokenizer, such as `tokenizer`"""
    single_file_prefix: str = ""
    """Prefix of its weights' names in single-file checkpoints; empty for families without such files"""


class Component(NamedTuple):
    """Classes that a component of a pipeline may have, as the index of a diffusers folder names them."""

    library: str
    """`diffusers` or `transformers`"""
    classes: tuple[str, ...]
    required: bool = True
    """Whether a folder must have it"""


class Family(ABC):
    """An architecture of bases; each is one file in `diffgraft.bases.families`."""

    name: str
    """Short name, which is also written to the header of adapter files"""
    pipeline_class: str = ""
    """Class name of the diffusers pipeline of such bases; empty if `pipeline` is overridden"""
    denoiser: str
    """Name of the denoiser in pipelines, adapter paths and strengths, such as `unet`"""
    text: Sequence[TextSlot]
    """Text encoders, in order"""
    conditioners: Sequence[TextSlot] = ()
    """Frozen networks between text encoders and denoiser, each with the tokenizer that it reads; nothing trains them"""
    components: Mapping[str, Component] = {}
    """Component of its pipelines → what it may be, for bases that are loaded from a diffusers folder"""
    patch: int = 1
    """Side of the patches of latents that the denoiser reads as one token; both sides of latents are multiples of it"""
    guidance: float | None = None
    """Usual scale of classifier-free guidance; None: that of Stable Diffusion"""
    layers: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Network → group (`attention`, `feedforward`, `convolution`, `modulation`) → endings of the paths of its layers,
    in which ``*`` stands for one step; `context` are those of the attention that compute keys and values from the
    hidden states of text encoders alone"""
    blocks: bool = False
    """Whether the denoiser has the block names IN00 … M00 … OUT11; if not, strengths only know BASE"""
    checkpointed: tuple[str, ...] = ()
    """Class names of the blocks that gradient checkpointing computes again; they are also sharded and swapped"""
    original: OriginalLayout | None = None
    """Names of the denoiser's layers in its authors' code, for files with them; None: see `diffgraft.bases.ldm_keys`"""
    bundled: Mapping[str, tuple[str, ...]] = {}
    """Part → prefixes that its weights may have in a single file that holds it beside a transformer"""
    published: str = ""
    """Hub id of a published base, for advice; empty if there is none"""
    unsupported: Mapping[str, str] = {}
    """Recipe key that this family does not support → reason; ``train`` and ``plan`` refuse such keys"""

    @abstractmethod
    def matches(self, pipe: Any) -> bool:
        """Whether a loaded diffusers pipeline is of this family, and of no other."""

    @abstractmethod
    def parameterization(self, scheduler: Any) -> Parameterization:
        """Return the denoiser's prediction and noise schedule, from a diffusers `scheduler`."""

    @abstractmethod
    def encode(self, base: "Base", prompts: Sequence[str], whole: bool) -> Conditioning:
        """Encode n prompts to conditioning with hidden states [n, tokens, width] on the base's device.

        Args:
            base: base whose tokenizers and text encoders are used.
            prompts: n prompts.
            whole: whether prompts beyond the tokenizer's length are read in chunks instead of being truncated.
        """

    @property
    def has_token_weights(self) -> bool:
        """Whether the family implements `text_states`, so that words can have weights."""
        return type(self).text_states is not Family.text_states

    def text_states(
        self,
        base: "Base",  # noqa: ARG002
        ids: Sequence[Tensor],  # noqa: ARG002
        clip_skip: int = 1,  # noqa: ARG002
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the text encoders on token ids, so that tokens can have weights.

        Args:
            base: base whose text encoders are used.
            ids: token ids [n, chunks, length] for each text encoder.
            clip_skip: layer whose output is used, counted from the last, which is 1.

        Returns:
            Hidden states [n, chunks, length, width] of each text encoder, and `Conditioning.added`.

        Raises:
            DiffgraftError: the family has no weights of words, or `clip_skip` is more than its layers.
        """
        raise DiffgraftError(
            f"Bases of the family {self.name} have no weights of words and no chunks: write the prompt without "
            "parentheses, brackets and BREAK, or set emphasis=none."
        )

    @abstractmethod
    def denoise(
        self, base: "Base", denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Return the prediction [n, c, h, w] for noisy latents [n, c, h, w] at `timesteps` [n].

        Args:
            base: base of the denoiser.
            denoiser: `base.denoiser`, or a compiled or sharded copy of it.
            noisy: noisy latents of the family's forward process.
            timesteps: indices into the schedule of `parameterization`; samplers also ask for fractions between two.
            conditioning: result of `encode` and `size_conditioning` for n prompts. Its `control` is None, or has a
                network that this family's `control_network` made, or an `InputControl`.
        """

    def schedule_timesteps(self, inputs: Tensor) -> Tensor:
        """Return timesteps from 0 to 1000 for `inputs` [n], the values that the denoiser takes as ``timestep``."""
        return inputs

    def control_network(self, base: "Base", settings: Mapping[str, Any] | None = None) -> nn.Module:  # noqa: ARG002
        """Build the network that steers the denoiser of `base` by condition pictures, in float32 on the CPU.

        Args:
            base: base that it is for; on the device ``meta``, the network is there as well.
            settings: the network's settings in a file, for a network on the device ``meta`` whose weights are loaded
                afterwards. None: a new network, which does not change any prediction yet. Its random values are those
                of PyTorch's own generator.

        Raises:
            DiffgraftError: the family has no such networks, or weights of the base that it copies are quantized.
            ValueError: `settings` are for a base of other widths, or not for such a network.
        """
        raise DiffgraftError(f"Bases of the family {self.name} have no control networks: use Stable Diffusion.")

    def empty_control_network(self, base: "Base", widths: Sequence[int] | None = None) -> nn.Module:  # noqa: ARG002
        """Build a network as `control_network` does, but without values, on the device ``meta``.

        Its modules with the names of modules of the denoiser are copies of those.

        Args:
            base: base that it is for; its weights are not read.
            widths: widths of the convolutions that read the condition picture; None: as in new networks.

        Raises:
            DiffgraftError: the family has no such networks.
        """
        raise DiffgraftError(f"Bases of the family {self.name} have no control networks: use Stable Diffusion.")

    def control_settings(self, network: nn.Module) -> dict[str, Any]:
        """Return the settings of a control network, as `control_network` takes them and files have them.

        By default they are the network's configuration, as diffusers' models have one.
        """
        return dict(network.config)  # type: ignore[arg-type]

    def student(self, base: "Base", size: StudentSize) -> nn.Module:  # noqa: ARG002
        """Build a smaller denoiser of the same class as the base's, in float32 on the CPU, or on ``meta`` as the base.

        Raises:
            DiffgraftError: the family has no smaller denoisers, `size` is not smaller, or the base is quantized.
        """
        raise DiffgraftError(f"Bases of the family {self.name} have no students: use Stable Diffusion.")

    def picture_layers(self, base: "Base") -> list[PictureLayer]:  # noqa: ARG002
        """Return the linear layers of the denoiser whose inputs are tokens of the picture, for an `InputControl`.

        Empty, as by default, for families without such control networks.
        """
        return []

    def denoiser_config(self, shapes: ShapeTable, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the fields of the denoiser's configuration that the shapes of its weights tell, for single files.

        Args:
            shapes: shapes of its weights, by their names in diffusers.
            config: the configuration without these fields, as far as it is known.

        Raises:
            DiffgraftError: a weight that tells a size is missing.
        """
        return {}

    def paired_widths(self, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:  # noqa: ARG002
        """Yield what the denoiser gets from the other parts, its width there, and the width of what they give.

        A base whose denoiser is a single file is refused if one of the pairs differs.
        """
        yield from ()

    def size_conditioning(self, frames: Sequence[SizeConditioning]) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the micro-conditioning of n pictures, tensors [n, …] by name; empty for denoisers without it."""
        return {}

    def affects_output(self, base: "Base", part: str, path: str) -> bool:  # noqa: ARG002
        """Whether the output of the module at `path` in the text encoder `part` affects the denoiser."""
        return True

    def latents(self, base: "Base") -> LatentSpec:
        """Return channels, scale and shift of the VAE's latents."""
        config = base.vae.config
        return LatentSpec(int(config.latent_channels), config.scaling_factor, getattr(config, "shift_factor", 0) or 0.0)

    def pixels_per_latent(self, base: "Base") -> int:
        """Return the number of pixels per latent along one side."""
        return int(2 ** (len(base.vae.config.block_out_channels) - 1))

    def posterior(self, base: "Base", pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures to mean and standard deviation of their latents, both [n, c, h, w] in float32.

        Args:
            base: base of the VAE.
            pixels: n pictures [n, 3, height, width] with values from -1 to 1.
        """
        found = base.vae.encode(pixels.to(base.vae.device, base.vae.dtype)).latent_dist
        return base.scaled(found.mean.float()), found.std.float() * self.latents(base).scale

    def decode(self, base: "Base", latents: Tensor) -> Tensor:
        """Decode latents [n, c, h, w] to pictures [n, 3, height, width] with values from about -1 to 1."""
        spec = self.latents(base)
        pixels: Tensor = base.vae.decode((latents / spec.scale + spec.shift).to(base.vae.dtype)).sample
        return pixels

    def embeds_guidance(self, base: "Base") -> bool:  # noqa: ARG002
        """Whether the denoiser is guidance-distilled: it reads the scale of guidance, in `Conditioning.added`."""
        return False

    def normed_guidance(self, guided: Tensor, plain: Tensor) -> Tensor:  # noqa: ARG002
        """Return a guided prediction [c, h, w] in the size that the family draws with; `plain` is at a scale of 1."""
        return guided

    def sampling_sigmas(self, base: "Base", tokens: int, steps: int) -> list[float] | None:  # noqa: ARG002
        """Return the family's own noise levels for drawing, or None if each sampler has its own.

        Args:
            base: base that draws.
            tokens: number of patches in the latents of the picture.
            steps: number of steps.

        Returns:
            σ / α before each step and 0 after the last, `steps` + 1 of them.
        """
        return None

    @property
    def has_timestep_shift(self) -> bool:
        """Whether the family implements `timestep_shift`."""
        return type(self).timestep_shift is not Family.timestep_shift

    def timestep_shift(self, base: "Base", height: int, width: int) -> float:
        """Return the shift of training timesteps for latents of this size: the recipe's ``timesteps.shift=size``."""
        raise NotImplementedError(f"the family {self.name} has no shift by size")

    def native_size(self, base: "Base") -> int:
        """Return the native side of pictures, in latents."""
        return int(base.denoiser.config.sample_size)

    def header(self, base: "Base") -> dict[str, Any]:  # noqa: ARG002
        """Return entries for an adapter's header on the base's topology, if names in adapter files depend on it."""
        return {}

    def block_for_timing(self, base: "Base") -> tuple[nn.Module, dict[str, tuple[int, ...]], int]:
        """Return a block of the denoiser for measuring the device's speed.

        Returns:
            The block, the shapes of its keyword arguments, and the channels of its input [1, channels, side, side].
        """
        raise NotImplementedError(f"the family {self.name} has no block_for_timing")

    def set_attention(self, denoiser: Any, kind: str) -> Callable[[], None]:
        """Set how attention is computed, and return a function that sets it back.

        `kind` is a value of the recipe key ``attention``; families without it list the key in `unsupported`.
        """
        raise NotImplementedError(f"the family {self.name} does not support attention={kind}")

    def pipeline(self, base: "Base") -> Any:
        """Return a pipeline of the modules of `base`, which is called as diffusers' pipelines are."""
        shared: dict[str, Any] = dict(base.parts()) | base.tokenizers()
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        pipe = pipeline_of(self.pipeline_class, {"scheduler": scheduler, **shared})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def single_file_prefixes(self) -> dict[str, str]:
        """Text encoder → prefix of its weights' names in single-file checkpoints; empty for families without such."""
        return {slot.component: slot.single_file_prefix for slot in self.text if slot.single_file_prefix}
