"""Regions of a picture, each with a prompt and adapters of its own."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffgraft.errors import DiffgraftError, short_repr
from diffgraft.generation.checks import check_fields

_MOST_BYTES, _MOST_SIDE = 2_000_000, 1024
"""Size of a mask in a picture's record at most, in bytes and in pixels"""


@dataclass(frozen=True)
class Region:
    """A part of the picture; adapters that its prompt names by tags act in it alone.

    Where regions overlap, their predictions are averaged by weight; the picture's own prompt counts where there is
    none.
    """

    prompt: str
    """What the region shows, with tags of its adapters"""
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right and bottom, as shares of the picture's width and height"""
    mask: Image.Image | None = None
    """Mask of the picture's aspect ratio, white in the region; it takes the place of `box`"""
    weight: float = 1.0
    """Weight where it overlaps with others"""
    alone: float = 0.9
    """Share of the steps in which it is predicted as a picture of its own, so that its subject lies inside of it; then
    the whole picture is, so that both fit together"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for a box that is empty or not within the picture, or a weight that is none."""
        check_fields(self, ("prompt", "weight", "alone"))
        if not isinstance(self.box, list | tuple) or len(self.box) != 4 or not all(map(_is_number, self.box)):
            raise DiffgraftError(f"Invalid region {self.box}: must be left, top, right and bottom, such as 0,0,0.5,1.")
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise DiffgraftError(
                f"Invalid region {','.join(f'{side:g}' for side in self.box)}: left, top, right and bottom must be "
                "shares from 0 to 1, with left < right and top < bottom."
            )
        if self.mask is not None:
            if not isinstance(self.mask, Image.Image):
                raise DiffgraftError(f"Invalid mask {short_repr(self.mask)} of a region: must be a picture.")
            mask = self.mask.convert("L")
            mask.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.BOX)  # finer than any latents
            object.__setattr__(self, "mask", mask)
        if not 0 <= self.alone <= 1:
            raise DiffgraftError(f"Invalid value alone={self.alone:g} of a region: must be from 0 to 1.")
        if not 0 < self.weight <= 1000:
            raise DiffgraftError(f"Invalid value weight={self.weight:g} of a region: must be above 0 and at most 1000.")

    def area(self, height: int, width: int) -> Tensor:
        """Return the region at the size of latents, [1, height, width] with values from 0 to its weight."""
        if self.mask is not None:
            grey = self.mask.convert("L").resize((width, height), Image.Resampling.BOX)
            return torch.from_numpy(np.array(grey)).float().unsqueeze(0) / 255 * self.weight
        rows, columns = (
            _overlap(size, first, last)
            for size, first, last in ((height, self.box[1], self.box[3]), (width, self.box[0], self.box[2]))
        )
        return (rows.unsqueeze(1) * columns).unsqueeze(0) * self.weight

    def to_json(self) -> dict[str, Any]:
        """Return the region as JSON; its mask becomes a PNG file in base64."""
        plain: dict[str, Any] = {
            "prompt": self.prompt,
            "box": list(self.box),
            "weight": self.weight,
            "alone": self.alone,
        }
        if self.mask is not None:
            self.mask.convert("L").save(png := BytesIO(), "PNG", optimize=True)
            plain["mask"] = base64.b64encode(png.getvalue()).decode()
        return plain

    @classmethod
    def from_json(cls, region: Mapping[str, Any]) -> "Region":
        """Return the region of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: it is no such region.
        """
        mask = None
        if "mask" in region:
            content = base64.b64decode(str(region["mask"]), validate=True)
            if len(content) > _MOST_BYTES:
                raise ValueError("its mask is too large")
            with Image.open(BytesIO(content), formats=["PNG"]) as image:
                if max(image.size) > _MOST_SIDE:
                    raise ValueError("its mask is too large")
                mask = image.convert("L")
        left, top, right, bottom = (float(side) for side in region["box"])
        return cls(
            str(region["prompt"]), (left, top, right, bottom), mask, float(region["weight"]), float(region["alone"])
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _overlap(size: int, first: float, last: float) -> Tensor:
    """Return how much of each of `size` cells lies between two shares of their length, [size]."""
    edges = torch.arange(size + 1, dtype=torch.float64) / size
    inside = torch.minimum(edges[1:], torch.tensor(last)) - torch.maximum(edges[:-1], torch.tensor(first))
    return (inside.clamp_min(0) * size).float()
