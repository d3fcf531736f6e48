"""Condition pictures as input of generation: they steer the denoiser through a control network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.control import ConditionedNetwork
from diffgraft.bases import Base
from diffgraft.bases.family import ControlSignal
from diffgraft.edges import edges
from diffgraft.errors import DiffgraftError, short_repr
from diffgraft.generation.checks import check_fields
from diffgraft.pixels import to_tensor
from diffgraft.third_party import quiet_libraries

Maker = Literal["edges"]
"""What a condition picture can be made of another picture by"""
MAKERS: dict[str, Callable[[Image.Image], Image.Image]] = {"edges": edges}
_MOST_STRENGTH = 10


@dataclass(frozen=True)
class ControlInput:
    """A condition picture, and how much and in which steps it steers."""

    image: Image.Image
    """The condition picture, or a picture that it is made of; cropped to the aspect ratio that is drawn"""
    by: Maker | None = None
    """How the condition picture is made of `image`; None: `image` is the condition picture"""
    strength: float = 1.0
    """Factor on what the network adds to the denoiser; 1 as trained"""
    start: float = 0.0
    """Share of the steps after which it begins to steer"""
    end: float = 1.0
    """Share of the steps after which it no longer steers"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for what is no picture, or numbers out of their range."""
        if not isinstance(self.image, Image.Image):
            raise DiffgraftError(f"Invalid value control={short_repr(self.image)}: must be a picture (PIL).")
        if self.by is not None and self.by not in get_args(Maker):
            raise DiffgraftError(
                f"Invalid value control_by={short_repr(self.by)}: must be one of {', '.join(get_args(Maker))}, or "
                "missing for a picture that is a condition picture already."
            )
        check_fields(self, ("strength", "start", "end"))
        if not 0 <= self.strength <= _MOST_STRENGTH:
            raise DiffgraftError(
                f"Invalid value control_strength={self.strength:g}: must be 0 to {_MOST_STRENGTH}; 0.5 to 1 is usual."
            )
        if not 0 <= self.start < self.end <= 1:
            raise DiffgraftError(
                f"Invalid values control_start={self.start:g} and control_end={self.end:g}: must be shares of the "
                "steps from 0 to 1, the start before the end."
            )

    def resized(self, size: tuple[int, int]) -> Image.Image:
        """Return `image` at (width, height) in pixels, cropped to this aspect ratio."""
        return ImageOps.fit(self.image.convert("RGB"), size, Image.Resampling.LANCZOS)

    def picture(self, size: tuple[int, int]) -> Image.Image:
        """Return the condition picture at (width, height) in pixels."""
        resized = self.resized(size)
        return resized if self.by is None else MAKERS[self.by](resized)


@dataclass(frozen=True)
class Steering:
    """A control network in use by a session, and its condition picture."""

    network: nn.Module
    """Result of `ConditionedNetwork.build`, on the device and in the precision of the denoiser"""
    control: ControlInput
    name: str
    """Name by which its file is known; empty if it has none"""
    hash: str
    """`diffgraft.generation.adapter_library.content_hash` of its file; empty if it has none"""

    def for_pass(self, size: tuple[int, int], steps: int, pixels_per_latent: int) -> "StepControl":
        """Return the control inputs of the denoiser for one pass of the sampler: `steps` steps at `size` in pixels."""
        pictures = to_tensor([self.control.picture(size)]) / 2 + 0.5
        return StepControl(self.network, self.control, pictures, steps, pixels_per_latent)


@dataclass(frozen=True)
class StepControl:
    """The condition picture of a run of the sampler, by step and part of the picture."""

    network: nn.Module
    control: ControlInput
    pictures: Tensor
    """[1, 3, height, width] in pixels, with values from 0 to 1"""
    steps: int
    """Number of steps of the run"""
    pixels_per_latent: int

    def signal(self, step: int, window: tuple[slice, slice] | None, count: int) -> ControlSignal | None:
        """Return what steers `count` predictions in a step, counted from 0; None in steps that are not steered.

        A step is steered if it begins at `start` or later and ends at `end` or earlier, as in diffusers.

        Args:
            step: the step.
            window: rows and columns of latents that are predicted; None: all of them.
            count: number of predictions.
        """
        if step / self.steps < self.control.start or (step + 1) / self.steps > self.control.end:
            return None
        pictures = self.pictures
        if window is not None:
            rows, columns = (
                slice(own.start * self.pixels_per_latent, own.stop * self.pixels_per_latent) for own in window
            )
            pictures = pictures[..., rows, columns]
        return ControlSignal(self.network, pictures.expand(count, -1, -1, -1), self.control.strength)


def reads_base(adapter: Adapter) -> bool:
    """Whether the control network of an adapter is built from the weights of the base."""
    return any(isinstance(network, ConditionedNetwork) and network.reads_base for network in adapter.networks)


def build_network(adapter: Adapter, base: Base, name: str, device: torch.device) -> nn.Module:
    """Build the control network of an adapter for a base, on `device` and in the precision of the denoiser.

    Raises:
        DiffgraftError: the adapter is not a control network, or was made for another base.
    """
    network = adapter.networks[0] if len(adapter.networks) == 1 else None
    if not isinstance(network, ConditionedNetwork):
        raise DiffgraftError(
            f"{name} is not a control network, but an adapter of the method {adapter.method}: give a run of the recipe "
            "control, its file, or a ControlNet folder of diffusers."
        )
    try:
        with quiet_libraries():
            return network.build(base).to(device, base.denoiser.dtype)
    except ValueError as error:
        raise DiffgraftError(f"{name} does not fit this base: {error}.") from error
