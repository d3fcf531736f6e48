"""Pictures in one call: a base, adapters over it, and prompts; the command `generate` and its counterpart in Python."""

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
from diffgraft.devices import device_of, dtype_of
from diffgraft.errors import DiffgraftError, check_options, did_you_mean, short_repr, wrap_system_errors
from diffgraft.generation.generate import Settings
from diffgraft.generation.generate import generate as draw
from diffgraft.generation.graft import Grafts, graft
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.prompts import cut_prompt, unread_syntax

OFFLOADS = ("none", "model")
Picture = str | Path | Image.Image


class DrawingOptions(LoadOptions, total=False):
    """How pictures are drawn, and how the base is loaded where it is given by name."""

    size: tuple[int, int] | None
    """(width, height) in pixels; the base's own where it is not given"""
    steps: int
    """Denoising steps; 25 where it is not given"""
    guidance: float | None
    """Scale of classifier-free guidance; 1 is none"""
    negative: str
    """What they should not show"""
    scheduler: str | None
    """A name of `diffgraft.generation.generate.SCHEDULERS`"""
    tiling: bool
    """Decode pictures in tiles: less memory for large ones"""
    image: Picture | None
    """A picture to start from; its path or the picture"""
    denoise: float | None
    """With `image`, how far it is taken back to noise, above 0 and at most 1; 0.7 where it is not given"""
    mask: Picture | None
    """With `image`, a picture as large: white where it is drawn anew"""
    precision: str
    """``float32``, ``float16`` or ``bfloat16``; without it half precision on a GPU and float32 on a processor"""
    device: str
    """``cuda``, ``mps``, ``cpu`` and so on; without it the accelerator, where there is one"""
    offload: str
    """``model`` keeps on the GPU only the part that computes: less memory, a little more time"""


_LOADING = {"precision": "", "device": "", "offload": "none"}
"""Options of how a base is held → what they are where they are not given"""
_DRAWING = ("size", "steps", "guidance", "negative", "scheduler", "tiling")
"""Options that are those of `Settings`"""


@wrap_system_errors
def generate(
    prompt: str | Sequence[str],
    adapters: Grafts | str | PathLike[str] | Adapter | None = None,
    *,
    base: str | Path | Base = "tiny",
    count: int = 1,
    seed: int = 0,
    keep: Callable[[int, Image.Image], None] | None = None,
    **options: Unpack[DrawingOptions],
) -> list[Image.Image]:
    """Draw `count` pictures of each prompt, with adapters or without; those of the first prompt come first.

    Args:
        prompt: what they should show, or several.
        adapters: a file, a run or an `Adapter`, or several with their strengths, as `graft` takes them.
        base: what `load_base` takes, or a loaded base, which stays where and as it is: no option of how it is loaded
            can be given then.
        count: how many.
        seed: of the first picture of each prompt; the next ones count up.
        keep: called with the place of each picture and the picture as soon as it is drawn.
        options: those of `DrawingOptions`: size, steps, guidance, negative, scheduler, tiling; image, denoise, mask;
            precision, device, offload, and those of `load_base`.

    Raises:
        DiffgraftError: something of it cannot be; what can be told from the arguments is, before a base is loaded.
    """
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(one, str) for one in prompt)
    ):
        raise DiffgraftError(f"Invalid prompt {short_repr(prompt)}: must be a text, or a list of texts.")
    check_options("generate", options, DrawingOptions)
    settings = Settings(**{name: value for name, value in options.items() if name in _DRAWING})  # type: ignore[arg-type]
    source = _source(options.get("image"), options.get("denoise"), options.get("mask"))
    precision, device, offload = (str(options.get(name, usual)) for name, usual in _LOADING.items())
    if count < 1:
        raise DiffgraftError(f"count={count}: at least one picture can be drawn.")
    if offload not in OFFLOADS:
        raise DiffgraftError(f"There is no offload={offload!r}: {did_you_mean(offload, OFFLOADS)}")
    for file in adapters if isinstance(adapters, Mapping) else [adapters]:
        if isinstance(file, str | PathLike) and not Path(file).expanduser().exists():
            load_adapter(file)  # which says so
    more: Any = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
    if isinstance(base, Base):
        loading = {"precision": precision, "device": device, "offload": offload, **more}
        for name, value in loading.items():
            if value not in ("", "none", None):
                raise DiffgraftError(
                    f"{name}={value} tells how a base is loaded, and a loaded one was given: leave it out, or give the "
                    "base's name."
                )
        held = base
    else:
        place = device_of(device)
        if offload != "none" and place.type == "cpu":
            raise DiffgraftError("offload=model moves parts to a GPU and back, and no GPU is used here: leave it out.")
        held = load_base(base, dtype_of(precision, place), **more)
        if offload == "none":
            held.to(place)
    prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(count)]
    seeds = [seed + place % count for place in range(len(prompts))]
    for sentence in unread_syntax([*prompts[::count], settings.negative]):
        warnings.warn(sentence, stacklevel=3)
    with graft(held, adapters):
        pipe = held.pipeline()
        for sentence in cut_prompt(pipe.tokenizer, prompts[::count]):
            warnings.warn(sentence, stacklevel=3)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=place)
        try:
            return draw(pipe, prompts, settings, seeds, keep=keep, source=source)
        finally:
            pipe.remove_all_hooks()


def _source(image: Picture | None, denoise: float | None, mask: Picture | None) -> ImageInput | None:
    if image is None:
        for name, value in (("denoise", denoise), ("mask", mask)):
            if value is not None:
                raise DiffgraftError(
                    f"{name} is for a picture to start from, and there is none: give an image as well."
                )
        return None
    picture = image if isinstance(image, Image.Image) else read_picture(image)
    where = mask if mask is None or isinstance(mask, Image.Image) else read_picture(mask, "black")
    return ImageInput(picture, 0.7 if denoise is None else denoise, where)
