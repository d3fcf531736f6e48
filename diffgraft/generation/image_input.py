"""Pictures as input of generation: image to image and inpainting, by diffusers' pipelines."""

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from PIL import Image, ImageOps

from diffgraft.bases.pipelines import native_pixels
from diffgraft.errors import DiffgraftError
from diffgraft.third_party import quiet_libraries


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
        if not 0 < self.denoise <= 1:
            raise DiffgraftError(
                f"Invalid value denoise={self.denoise}: must be above 0 and at most 1; 0.5 to 0.8 is usual."
            )


@dataclass(frozen=True)
class ResizedInput:
    """An `ImageInput` resized to the size that is drawn."""

    image: Image.Image
    mask: Image.Image | None
    denoise: float

    def pipeline_arguments(self, count: int) -> dict[str, Any]:
        """Return the keyword arguments of diffusers' pipelines for `count` pictures."""
        masks = {} if self.mask is None else {"mask_image": [self.mask] * count}
        return {"image": [self.image] * count, "strength": self.denoise, **masks}

    def restore_unmasked(self, drawn: Image.Image) -> Image.Image:
        """Return `drawn` with the input's pixels outside the mask, which the VAE has changed a little."""
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


def inpainting_input(pipe: Any, image_input: ImageInput | None, size: tuple[int, int] | None) -> ImageInput:
    """Return the input of an inpainting denoiser, which always needs one: a grey picture, all masked, by default."""
    if image_input is None:
        side = native_pixels(pipe)
        image_input = ImageInput(Image.new("RGB", size or (side, side), (128, 128, 128)), denoise=1.0)
    return replace(image_input, mask=image_input.mask or Image.new("L", image_input.image.size, 255))


def prepare_image_input(pipe: Any, image_input: ImageInput, arguments: dict[str, Any]) -> tuple[Any, ResizedInput]:
    """Return a pipeline for `image_input`, made of the modules of `pipe`, and the input resized.

    Args:
        pipe: a text-to-image pipeline.
        image_input: picture, and mask if there is one.
        arguments: keyword arguments of the pipeline, with width and height in pixels. Both are removed for image to
            image, which takes the size from the picture.

    Raises:
        DiffgraftError: the mask is not of the picture's size, or is black everywhere.
    """
    with quiet_libraries():
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    size = (arguments["width"], arguments["height"])
    image = ImageOps.fit(image_input.image.convert("RGB"), size, Image.Resampling.LANCZOS)
    mask = None
    if image_input.mask is not None:
        if image_input.mask.size != image_input.image.size:
            sizes = ["x".join(map(str, image.size)) for image in (image_input.mask, image_input.image)]
            raise DiffgraftError(f"The mask is {sizes[0]} and the picture {sizes[1]}: both must have the same size.")
        mask = ImageOps.fit(_flatten_mask(image_input.mask), size, Image.Resampling.BILINEAR)
        if mask.getextrema() == (0, 0):
            raise DiffgraftError(
                "The mask is black everywhere, so nothing would be redrawn: paint white what should be."
            )
    kind = AutoPipelineForImage2Image if mask is None else AutoPipelineForInpainting
    input_pipe = kind.from_pipe(pipe)
    input_pipe.set_progress_bar_config(disable=True)
    if mask is None:  # image to image takes the size from the picture
        del arguments["width"], arguments["height"]
    return input_pipe, ResizedInput(image, mask, image_input.denoise)


def _flatten_mask(mask: Image.Image) -> Image.Image:
    """Return a mask in mode L, with transparent pixels as black."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    painted = mask.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), painted).convert("L")


def native_size(pipe: Any, image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) with the picture's aspect ratio and about the base's native number of pixels."""
    side, step = native_pixels(pipe), lcm(pipe.vae_scale_factor, 8)
    zoom = side / (image.width * image.height) ** 0.5
    width, height = (max(step, round(length * zoom / step) * step) for length in image.size)
    return width, height


def steps_from_image(image_input: ImageInput, steps: int) -> int:
    """Return the number of denoising steps that are computed: the share `denoise` of `steps`.

    Raises:
        DiffgraftError: the share is less than one step.
    """
    if int(steps * image_input.denoise) < 1:
        raise DiffgraftError(f"denoise={image_input.denoise} of {steps} steps is less than one step: raise either.")
    return min(steps, int(steps * image_input.denoise))
