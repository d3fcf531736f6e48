"""Settings of a session's pictures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.generation.checks import check_fields, checked_seeds
from diffgraft.generation.grammar.encode import Encoding
from diffgraft.generation.regions import Region
from diffgraft.generation.samplers.names import named_sampler
from diffgraft.generation.samplers.noise import NoiseSource
from diffgraft.generation.samplers.schedules import SCHEDULES

Upscaler = Literal["latent", "latent nearest", "latent bicubic", "latent antialiased", "lanczos", "nearest"]
"""How the first pass of a hires fix is enlarged: its latents, or its decoded pixels"""

_MOST_STEPS, _MOST_SIDE, _MOST_GUIDANCE, _MOST_DELTA = 1000, 8192, 100, 2**62


@dataclass(frozen=True)
class Hires:
    """A second pass at a larger size (webui's hires fix), so that large pictures keep the composition of small ones."""

    scale: float = 2.0
    """Factor on both sides of the picture"""
    denoise: float = 0.7
    """How much noise the second pass starts from, above 0 and at most 1; latent upscalers need 0.5 and more"""
    steps: int = 0
    """Number of steps of the second pass before `denoise` shortens it; 0: as many as the first"""
    upscaler: Upscaler = "latent"
    """How the first pass is enlarged"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for values that cannot be drawn with."""
        check_fields(self, ("scale", "denoise", "steps"))
        if not 1 <= self.scale <= 8:
            raise DiffgraftError(f"Invalid value hires.scale={self.scale:g}: must be 1 to 8; 1.5 to 2 is usual.")
        if not 0 < self.denoise <= 1:
            raise DiffgraftError(
                f"Invalid value hires.denoise={self.denoise:g}: must be above 0 and at most 1; 0.5 to 0.7 is usual."
            )
        if not 0 <= self.steps <= _MOST_STEPS:
            raise DiffgraftError(f"Invalid value hires.steps={self.steps}: must be 0 to {_MOST_STEPS}.")
        if self.upscaler not in get_args(Upscaler):
            raise DiffgraftError(
                f"Invalid value hires.upscaler={self.upscaler!r}: {did_you_mean(self.upscaler, get_args(Upscaler))}"
            )


@dataclass(frozen=True)
class DrawSettings:
    """Settings of generation: sampler, steps, guidance, size and more."""

    size: tuple[int, int] | None = None
    """(width, height) in pixels; None: the base's native size, or the aspect ratio of a picture to start from"""
    steps: int = 25
    """Number of steps of the sampler"""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. None: what is usual for the base's family, 7.5 for Stable
    Diffusion and 3 for small bases"""
    embedded_guidance: float = 3.5
    """Guidance that is told to a guidance-distilled denoiser, such as that of FLUX.1 dev; others do not read it"""
    rescale: float = 0.0
    """Guidance rescale, from 0 to 1 (Lin et al. 2023, arXiv:2305.08891); 0.7 for bases with zero terminal SNR"""
    mimic: float | None = None
    """Dynamic thresholding: values are clipped and scaled to the range of this smaller guidance. None: off"""
    percentile: float = 1.0
    """With `mimic`, share of the values that lie within the range before it is scaled; 0.95 to 1 is usual"""
    negative: str = ""
    """Negative prompt, with weights and changes between steps, but without ``AND``"""
    sampler: str = "euler"
    """Name in `diffgraft.generation.samplers.names.SAMPLERS`"""
    schedule: str | None = None
    """Name in `diffgraft.generation.samplers.schedules.SCHEDULES`; None: the one webui has for the sampler"""
    noise: NoiseSource = "cpu"
    """Whose random numbers are used: ``cpu`` as ComfyUI, ``gpu`` as webui"""
    variation_seed: int | None = None
    """Seed toward whose noise that of the pictures is turned"""
    variation_strength: float = 0.0
    """How far, from 0 to 1"""
    noise_seed_delta: int = 0
    """webui's ENSD: added to the seed of the noise that ancestral samplers add in their steps; 0: that noise continues
    the numbers that the picture starts from. Paths of SDE samplers do not use it"""
    hires: Hires | None = None
    """Second pass at a larger size; None: no second pass"""
    regions: tuple[Region, ...] = ()
    """Regions with prompts and adapters of their own"""
    encoding: Encoding = field(default_factory=Encoding)
    """How prompts are read and encoded"""
    batch: int | None = None
    """Pictures in a batch; None: chosen by their size"""
    tiling: bool = False
    """Whether to decode in overlapping tiles, which saves memory for large pictures; edges of tiles may show"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for values that no base can draw with."""
        check_fields(self, [item.name for item in fields(self) if item.name not in ("regions", "hires", "encoding")])
        self._check_groups()
        named_sampler(self.sampler)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise DiffgraftError(f"Invalid value schedule={self.schedule!r}: {did_you_mean(self.schedule, SCHEDULES)}")
        if not 1 <= self.steps <= _MOST_STEPS:
            raise DiffgraftError(f"Invalid value steps={self.steps}: must be 1 to {_MOST_STEPS}; 20 to 50 is usual.")
        scales = {"guidance": self.guidance, "embedded_guidance": self.embedded_guidance, "mimic": self.mimic}
        for name, scale in scales.items():
            if scale is not None and not 0 <= scale <= _MOST_GUIDANCE:
                raise DiffgraftError(
                    f"Invalid value {name}={scale:g}: must be 0 to {_MOST_GUIDANCE}; 1 is off, 5 to 9 is usual."
                )
        for name, share in (
            ("rescale", self.rescale),
            ("percentile", self.percentile),
            ("variation_strength", self.variation_strength),
        ):
            if not 0 <= share <= 1:
                raise DiffgraftError(f"Invalid value {name}={share:g}: must be from 0 to 1.")
        if self.noise not in get_args(NoiseSource):
            raise DiffgraftError(
                f"Invalid value noise={self.noise!r}: must be one of {', '.join(get_args(NoiseSource))}."
            )
        if self.batch is not None and self.batch < 1:
            raise DiffgraftError(f"Invalid value batch={self.batch}: must be at least 1.")
        if self.size is not None and not all(0 < side <= _MOST_SIDE for side in self.size):
            width, height = self.size
            raise DiffgraftError(f"Invalid value size={width}x{height}: sides must be 8 to {_MOST_SIDE} pixels.")

    def _check_groups(self) -> None:
        for name, kind in (("hires", Hires), ("encoding", Encoding)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (name, value) != ("hires", None):
                raise DiffgraftError(f"Invalid value {name}={short_repr(value)}: must be a {kind.__name__}(…).")
        if not isinstance(self.regions, list | tuple) or not all(isinstance(item, Region) for item in self.regions):
            raise DiffgraftError(f"Invalid value regions={short_repr(self.regions)}: must be a list of Region(…).")
        object.__setattr__(self, "regions", tuple(self.regions))
        if self.variation_seed is not None:
            checked_seeds([self.variation_seed])
        if not isinstance(self.noise_seed_delta, int) or abs(self.noise_seed_delta) >= _MOST_DELTA:
            raise DiffgraftError(
                f"Invalid value noise_seed_delta={self.noise_seed_delta!r}: must be a whole number between "
                f"-{_MOST_DELTA} and {_MOST_DELTA}."
            )

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, as JSON has them."""
        plain = DrawSettings()
        return {
            item.name: _plain(value)
            for item in fields(self)
            if (value := getattr(self, item.name)) != getattr(plain, item.name)
        }

    @classmethod
    def from_changed(cls, values: Mapping[str, Any]) -> "DrawSettings":
        """Return the settings of `changed`.

        Raises:
            DiffgraftError: a setting is unknown, or its value is invalid.
        """
        try:
            given = dict(values)
            if given.get("size") is not None:
                width, height = given["size"]
                given["size"] = (int(width), int(height))
            for name, kind in (("hires", Hires), ("encoding", Encoding)):
                if given.get(name) is not None:
                    given[name] = kind(**given[name])
            given["regions"] = tuple(Region.from_json(region) for region in given.get("regions", ()))
            return cls(**given)
        except DiffgraftError:
            raise
        except Exception as error:  # decoders of masks raise many kinds of exceptions for damaged ones
            raise DiffgraftError(f"The settings {short_repr(values)} cannot be read: {error}.") from error


def _plain(value: Any) -> Any:
    """Return the value of a setting as JSON has it."""
    if isinstance(value, Hires | Encoding):
        return asdict(value)
    if isinstance(value, tuple) and any(isinstance(item, Region) for item in value):
        return [region.to_json() for region in value]
    return value
