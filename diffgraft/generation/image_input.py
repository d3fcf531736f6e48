"""Pictures to start from instead of noise alone, and to draw into, in diffusers' pipelines for that."""

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from PIL import Image, ImageOps

from diffgraft.bases.pipelines import native_pixels
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries


@dataclass(frozen=True)
class ImageInput:
    """A picture to start from instead of noise alone (image to image), or to draw into (inpainting)."""

    image: Image.Image
    denoise: float = 0.7
    """How far it is taken back to noise: near 0 it stays as it is, at 1 nothing of it is left. diffusers says
    `strength`, which here is an adapter's"""
    mask: Image.Image | None = None
    """As large as the picture: white where it is drawn anew, black where it stays"""

    def __post_init__(self) -> None:
        if not 0 < self.denoise <= 1:
            raise DiffgraftError(
                f"Invalid value denoise={self.denoise}: must be above 0 and at most 1; 0.5 to 0.8 is usual."
            )


@dataclass(frozen=True)
class ResizedInput:
    """A source in the size that is drawn."""

    image: Image.Image
    mask: Image.Image | None
    denoise: float

    def arguments(self, count: int) -> dict[str, Any]:
        """What diffusers' pipelines are told for `count` pictures."""
        masks = {} if self.mask is None else {"mask_image": [self.mask] * count}
        return {"image": [self.image] * count, "strength": self.denoise, **masks}

    def finished(self, drawn: Image.Image) -> Image.Image:
        """What was drawn, with the very pixels of the source where it stays: the VAE has changed them a little."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


def inpainting_input(pipe: Any, source: ImageInput | None, size: tuple[int, int] | None) -> ImageInput:
    """The source for an inpainting denoiser, which always needs one: without it, grey that is drawn all over."""
    if source is None:
        own = native_pixels(pipe)
        source = ImageInput(Image.new("RGB", size or (own, own), (128, 128, 128)), denoise=1.0)
    return replace(source, mask=source.mask or Image.new("L", source.image.size, 255))


def prepare_image_input(pipe: Any, source: ImageInput, more: dict[str, Any]) -> tuple[Any, ResizedInput]:
    """The pipeline for a source, over the same modules, and the source in its size."""
    with quiet_libraries():
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    size = (more["width"], more["height"])
    image = ImageOps.fit(source.image.convert("RGB"), size, Image.Resampling.LANCZOS)
    mask = None
    if source.mask is not None:
        if source.mask.size != source.image.size:
            sizes = ["x".join(map(str, image.size)) for image in (source.mask, source.image)]
            raise DiffgraftError(f"The mask is {sizes[0]} and the picture {sizes[1]}: they must be of one size.")
        mask = ImageOps.fit(_on_black(source.mask), size, Image.Resampling.BILINEAR)
        if mask.getextrema() == (0, 0):
            raise DiffgraftError("The mask is black everywhere, so nothing would be drawn: paint white what should be.")
    kind = AutoPipelineForImage2Image if mask is None else AutoPipelineForInpainting
    drawing = kind.from_pipe(pipe)
    drawing.set_progress_bar_config(disable=True)
    if mask is None:  # it takes the size from the picture
        del more["width"], more["height"]
    return drawing, ResizedInput(image, mask, source.denoise)


def _on_black(mask: Image.Image) -> Image.Image:
    """A mask as "L"; what is transparent in it counts as black."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    painted = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), painted).convert("L")


def native_size(pipe: Any, image: Image.Image) -> tuple[int, int]:
    """The picture's shape, at about as many pixels as the base was made for."""
    own, step = native_pixels(pipe), lcm(pipe.vae_scale_factor, 8)
    zoom = own / (image.width * image.height) ** 0.5
    width, height = (max(step, round(side * zoom / step) * step) for side in image.size)
    return width, height


def steps_from_image(source: ImageInput, steps: int) -> int:
    """How many of the steps are left from where a source is taken back to."""
    if int(steps * source.denoise) < 1:
        raise DiffgraftError(f"denoise={source.denoise} leaves none of {steps} steps. Raise one of them.")
    return min(steps, int(steps * source.denoise))
