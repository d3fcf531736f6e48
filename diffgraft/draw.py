"""Generation in one call, from a base, adapters and prompts: `diffgraft.generate` and the command `generate`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import LoadOptions
from diffgraft.data.pictures import read_picture
from diffgraft.devices import device_of, dtype_of, warn_of_slow_bfloat16
from diffgraft.errors import DiffgraftError, check_options, did_you_mean, short_repr, wrap_system_errors
from diffgraft.generation.generate import Settings
from diffgraft.generation.generate import generate as draw
from diffgraft.generation.graft import AdapterStrengths, graft
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.prompts import truncation_warnings, unread_syntax

OFFLOADS = ("none", "model")
Picture = str | Path | Image.Image


class DrawingOptions(LoadOptions, total=False):
    """Options of `generate`: for drawing, and for loading a base that is given by name."""

    size: tuple[int, int] | None
    """(width, height) in pixels; the base's native size by default"""
    steps: int
    """Number of denoising steps; 25 by default"""
    guidance: float | None
    """Scale of classifier-free guidance; 1 turns it off"""
    negative: str
    """Negative prompt: what the pictures should not show"""
    scheduler: str | None
    """Name of a scheduler, from `diffgraft.generation.generate.SCHEDULERS`"""
    tiling: bool
    """Whether to decode pictures in tiles, which saves memory for large ones"""
    image: Picture | None
    """Picture to start from (image to image): a path or a PIL image"""
    denoise: float | None
    """With `image`, how much noise is added to it, above 0 and at most 1; 0.7 by default"""
    mask: Picture | None
    """With `image`, a mask of the same size, white where the picture is redrawn (inpainting)"""
    precision: str
    """``float32``, ``float16`` or ``bfloat16``; by default float16 on a GPU and float32 on the CPU"""
    device: str
    """``cuda``, ``mps``, ``cpu`` and so on; by default the accelerator, or the CPU on machines without one"""
    offload: str
    """``model`` keeps only the computing part on the GPU, which saves memory and costs a little time; or ``none``"""


_LOADING = {"precision": "", "device": "", "offload": "none"}
"""Options for holding a base → their defaults"""
_DRAWING = ("size", "steps", "guidance", "negative", "scheduler", "tiling")
"""Options that become fields of `Settings`"""


@wrap_system_errors
def generate(
    prompt: str | Sequence[str],
    adapters: AdapterStrengths | str | PathLike[str] | Adapter | None = None,
    *,
    base: str | Path | Base = "tiny",
    count: int = 1,
    seed: int = 0,
    keep: Callable[[int, Image.Image], None] | None = None,
    **options: Unpack[DrawingOptions],
) -> list[Image.Image]:
    """Draw `count` pictures of each prompt, with or without adapters.

    Args:
        prompt: one prompt, or a list of several.
        adapters: a file, a run or an `Adapter`, or a mapping of several to their strengths, as for `graft`.
        base: name or path of a base, as for `load_base`, or a loaded `Base`. A loaded base stays on its device and in
            its dtype, and options for loading cannot be given with it.
        count: number of pictures of each prompt.
        seed: seed of the first picture of each prompt; each further picture adds 1.
        keep: callback that receives the index of a picture and the picture as soon as it is drawn.
        options: options of `DrawingOptions`: size, steps, guidance, negative, scheduler, tiling; image, denoise, mask;
            precision, device, offload, and those of `load_base`.

    Returns:
        All pictures, those of the first prompt first.

    Raises:
        DiffgraftError: an argument is invalid (checked before a base is loaded where possible), or an adapter does
            not fit the base.
    """
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
    ):
        raise DiffgraftError(f"Invalid prompt {short_repr(prompt)}: must be a text, or a list of texts.")
    check_options("generate", options, DrawingOptions)
    settings = Settings(**{name: value for name, value in options.items() if name in _DRAWING})  # type: ignore[arg-type]
    image_input = _image_input(options.get("image"), options.get("denoise"), options.get("mask"))
    precision, device, offload = (str(options.get(name, default)) for name, default in _LOADING.items())
    if count < 1:
        raise DiffgraftError(f"Invalid value count={count}: must be at least 1.")
    if offload not in OFFLOADS:
        raise DiffgraftError(f"Invalid value offload={offload!r}: {did_you_mean(offload, OFFLOADS)}")
    for file in adapters if isinstance(adapters, Mapping) else [adapters]:
        if isinstance(file, str | PathLike) and not Path(file).expanduser().exists():
            load_adapter(file)  # raises the error for a missing file
    load_options: Any = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
    if isinstance(base, Base):
        loading = {"precision": precision, "device": device, "offload": offload, **load_options}
        for name, value in loading.items():
            if value not in ("", "none", None):
                raise DiffgraftError(
                    f"{name}={value} is an option for loading a base, but base is already loaded: leave {name} out, or "
                    "give the base's name."
                )
    else:
        target = device_of(device)
        if offload != "none" and target.type == "cpu":
            raise DiffgraftError("offload=model needs a GPU, but the CPU computes here: leave it out.")
        warn_of_slow_bfloat16(precision, target)
        base = load_base(base, dtype_of(precision, target), **load_options)
        if offload == "none":
            base.to(target)
    prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(count)]
    seeds = [seed + index % count for index in range(len(prompts))]
    for sentence in unread_syntax([*prompts[::count], settings.negative]):
        warnings.warn(sentence, stacklevel=3)
    with graft(base, adapters):
        pipe = base.pipeline()
        for sentence in truncation_warnings(pipe.tokenizer, prompts[::count]):
            warnings.warn(sentence, stacklevel=3)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=target)
        try:
            return draw(pipe, prompts, settings, seeds, keep=keep, image_input=image_input)
        finally:
            pipe.remove_all_hooks()


def _image_input(image: Picture | None, denoise: float | None, mask: Picture | None) -> ImageInput | None:
    if image is None:
        for name, value in (("denoise", denoise), ("mask", mask)):
            if value is not None:
                raise DiffgraftError(
                    f"{name}={value} applies to a picture to start from, but image is missing: give image as well."
                )
        return None
    picture = image if isinstance(image, Image.Image) else read_picture(image)
    mask = mask if mask is None or isinstance(mask, Image.Image) else read_picture(mask, "black")
    return ImageInput(picture, 0.7 if denoise is None else denoise, mask)
