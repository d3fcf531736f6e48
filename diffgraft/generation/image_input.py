"""Pictures as input of generation: image to image, inpainting, and the second pass of a hires fix."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError, short_repr
from diffgraft.generation.checks import check_fields
from diffgraft.generation.latents import encode
from diffgraft.pixels import to_tensor

_MOST_RATIO = 20
"""Ratio of a picture's sides at most"""
_FULL = 0.999
"""Share of the steps that a picture is denoised in at most, as in webui, so that one step is left for `denoise` = 1"""


@dataclass(frozen=True)
class ImageInput:
    """A picture to start from (image to image), or to redraw in part (inpainting)."""

    image: Image.Image
    denoise: float = 0.7
    """How much noise is added to the picture: near 0 it stays as it is, at 1 it is lost. diffusers calls this
    `strength`, which here means the strength of an adapter"""
    mask: Image.Image | None = None
    """Mask of the picture's size: white where it is redrawn, black where it stays"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for what is no picture, or a share that is none."""
        for name in ("image", "mask"):
            value = getattr(self, name)
            if not isinstance(value, Image.Image) and (name, value) != ("mask", None):
                raise DiffgraftError(f"Invalid value {name}={short_repr(value)}: must be a picture (PIL).")
        check_fields(self, ("denoise",))
        if not 0 < self.denoise <= 1:
            raise DiffgraftError(
                f"Invalid value denoise={self.denoise:g}: must be above 0 and at most 1; 0.5 to 0.8 is usual."
            )

    def resized(self, size: tuple[int, int]) -> "ImageInput":
        """Return picture and mask at (width, height) in pixels, cropped to this aspect ratio.

        Raises:
            DiffgraftError: the mask is not of the picture's size, or is black everywhere.
        """
        image = ImageOps.fit(self.image.convert("RGB"), size, Image.Resampling.LANCZOS)
        if self.mask is None:
            return ImageInput(image, self.denoise)
        if self.mask.size != self.image.size:
            sizes = ["x".join(map(str, picture.size)) for picture in (self.mask, self.image)]
            raise DiffgraftError(f"The mask is {sizes[0]} and the picture {sizes[1]}: both must have the same size.")
        mask = ImageOps.fit(_flatten_mask(self.mask), size, Image.Resampling.BILINEAR)
        if mask.getextrema() == (0, 0):
            raise DiffgraftError(
                "The mask is black everywhere, so nothing would be redrawn: paint white what should be."
            )
        return ImageInput(image, self.denoise, mask)

    def restore_unmasked(self, drawn: Image.Image) -> Image.Image:
        """Return `drawn` with the input's pixels outside the mask, which the VAE has changed a little."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


@dataclass(frozen=True)
class InitialLatents:
    """Latents and mask that a pass of the sampler starts from instead of noise alone."""

    latents: Tensor
    """Clean latents, [1 or n, c, h, w]"""
    denoise: float
    """Share of the noise that is added"""
    mask: Tensor | None = None
    """1 where the latents are redrawn and 0 where they stay, [1, 1, h, w]"""

    @property
    def starts_from_pure_noise(self) -> bool:
        """Whether the picture is drowned in noise at the start, at denoise = 1, so that its latents do not matter."""
        return self.denoise == 1


def first_step(denoise: float, steps: int) -> int:
    """Return the first step that is computed, counted from 0: as in webui, ⌊denoise · steps⌋ + 1 of them are."""
    return steps - int(min(denoise, _FULL) * steps) - 1


def start_latents(base: Base, resized: ImageInput) -> InitialLatents:
    """Return what an input of the size that is drawn starts from."""
    latents = encode(base, [resized.image])
    return InitialLatents(latents, resized.denoise, None if resized.mask is None else mask_of(base, resized.mask))


def mask_of(base: Base, mask: Image.Image) -> Tensor:
    """Return a mask at the size of latents [1, 1, h, w], 1 where it is white, as webui rounds it."""
    size = tuple(side // base.vae_scale_factor for side in mask.size)
    small = mask.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return (to_tensor([small.convert("RGB")])[:, :1] / 2 + 0.5).round().to(base.device)


def inpainting_channels(base: Base, resized: ImageInput | None) -> Tensor | None:
    """Return the further channels [1, 1 + c, h, w] of an inpainting denoiser: the mask, and the picture without it.

    None stands for those of a whole picture to draw, which `Base.denoiser_input` adds itself.
    """
    if not base.is_inpainting or resized is None or resized.mask is None:
        return None
    hidden = Image.composite(
        Image.new("RGB", resized.image.size, (128, 128, 128)),
        resized.image,
        resized.mask.point(lambda value: 255 * (value > 127)),
    )
    return torch.cat([mask_of(base, resized.mask), encode(base, [hidden])], 1)


def native_size(base: Base, image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) with the picture's aspect ratio and about the base's native number of pixels."""
    side, step = base.resolution, base.size_step
    if max(image.size) > _MOST_RATIO * min(image.size):
        raise DiffgraftError(
            f"The picture is {image.width}x{image.height}: crop it, so that no side is {_MOST_RATIO} times the other."
        )
    zoom = side / (image.width * image.height) ** 0.5
    width, height = (max(step, round(length * zoom / step) * step) for length in image.size)
    return width, height


def _flatten_mask(mask: Image.Image) -> Image.Image:
    """Return a mask in mode L, with transparent pixels as black."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    painted = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), painted).convert("L")
