"""Generation in one call, from a base, adapters and prompts: `diffgraft.generate` and the command `generate`."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
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
from diffgraft.generation.adapter_library import usual_name
from diffgraft.generation.checks import checked_seeds
from diffgraft.generation.control import ControlInput, Maker
from diffgraft.generation.graft import AdapterStrengths
from diffgraft.generation.grammar.attention import Style
from diffgraft.generation.grammar.encode import Emphasis, Encoding
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.regions import Region
from diffgraft.generation.samplers.noise import NoiseSource
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires, Upscaler

OFFLOADS = ("none", "model")
Picture = str | Path | Image.Image

FORMER_SCHEDULERS: Mapping[str, tuple[str, str]] = {
    "ddim": ("ddim", "ddim"),
    "ddpm": ("euler a", "uniform"),
    "euler": ("euler", "uniform"),
    "euler-a": ("euler a", "uniform"),
    "heun": ("heun", "uniform"),
    "pndm": ("plms", "ddim"),
    "dpm++": ("dpm++ 2m", "uniform"),
    "dpm++-karras": ("dpm++ 2m", "karras"),
    "unipc": ("unipc", "uniform"),
}
"""Name of the former option `scheduler` → sampler and schedule"""


class DrawingOptions(LoadOptions, total=False):
    """Options of `generate`: for drawing, and for loading a base that is given by name."""

    size: tuple[int, int] | None
    """(width, height) in pixels; the base's native size by default"""
    steps: int
    """Number of denoising steps; 25 by default"""
    guidance: float | None
    """Scale of classifier-free guidance; 1 turns it off"""
    embedded_guidance: float
    """Guidance that is told to a distilled base, such as FLUX.1 dev; 3.5 by default"""
    rescale: float
    """Guidance rescale, 0 to 1"""
    mimic: float | None
    """Dynamic thresholding: the smaller guidance whose range of values is kept"""
    percentile: float
    """With `mimic`, share of values within the range, 0 to 1"""
    negative: str
    """Negative prompt: what the pictures should not show"""
    sampler: str
    """Name of a sampler, from `diffgraft.generation.samplers.names.SAMPLERS`"""
    schedule: str | None
    """Name of a schedule, from `diffgraft.generation.samplers.schedules.SCHEDULES`; the sampler's own by default"""
    noise: NoiseSource
    """``cpu``, or ``gpu`` for the random numbers of webui"""
    variation_seed: int | None
    """Seed toward whose noise that of the pictures is turned"""
    variation_strength: float
    """How far, 0 to 1"""
    noise_seed_delta: int
    """webui's ENSD: added to the seed of the noise that ancestral samplers add in their steps"""
    hires: float | None
    """Scale of a second pass at a larger size"""
    hires_denoise: float
    """With `hires`, how much noise the second pass starts from; 0.7 by default"""
    hires_steps: int
    """With `hires`, number of steps of the second pass; as many as the first by default"""
    upscaler: Upscaler
    """With `hires`, how the first pass is enlarged; ``latent`` by default"""
    style: Style
    """Whose grammar prompts are read by: ``webui`` or ``comfyui``"""
    emphasis: Emphasis
    """How weights of words are applied: ``original``, ``no-norm``, ``ignore`` or ``none``"""
    clip_skip: int
    """Layer of the text encoder whose output is used, counted from the last, which is 1"""
    batch: int | None
    """Pictures in a batch"""
    regions: tuple[Region, ...]
    """Parts of the picture with prompts and adapters of their own"""
    tiling: bool
    """Whether to decode pictures in tiles, which saves memory for large ones"""
    scheduler: str | None
    """Former name of `sampler` and `schedule`"""
    library: str | Path | None
    """Folder in which prompts find adapters by name"""
    wildcards: str | Path | None
    """Folder with the lists of ``__wildcards__``"""
    image: Picture | None
    """Picture to start from (image to image): a path or a PIL image"""
    denoise: float | None
    """With `image`, how much noise is added to it, above 0 and at most 1; 0.7 by default"""
    mask: Picture | None
    """With `image`, a mask of the same size, white where the picture is redrawn (inpainting)"""
    control: Picture | None
    """Condition picture that steers drawing: a path or a PIL image; needs `control_net`"""
    control_net: str | PathLike[str] | Adapter | None
    """Control network: a run of the recipe `control`, its file, or a ControlNet folder of diffusers"""
    control_by: Maker | None
    """``edges`` where `control` is a picture whose edges steer; by default it is the condition picture itself"""
    control_strength: float
    """Factor on what the control network adds; 1 by default"""
    control_start: float
    """Share of the steps after which it begins to steer; 0 by default"""
    control_end: float
    """Share of the steps after which it no longer steers; 1 by default"""
    precision: str
    """``float32``, ``float16`` or ``bfloat16``; by default float16 on a GPU and float32 on the CPU"""
    device: str
    """``cuda``, ``mps``, ``cpu`` and so on; by default the accelerator, or the CPU on machines without one"""
    offload: str
    """``model`` keeps only the computing part on the GPU, which saves memory and costs a little time; or ``none``"""


_LOADING = {"precision": "", "device": "", "offload": "none"}
"""Options for holding a base → their defaults"""
_HIRES = {"hires": "scale", "hires_denoise": "denoise", "hires_steps": "steps", "upscaler": "upscaler"}
"""Option → field of `Hires`"""
_CONTROL = {"control_by": "by", "control_strength": "strength", "control_start": "start", "control_end": "end"}
"""Option → field of `ControlInput`"""


@wrap_system_errors
def generate(
    prompt: str | Sequence[str],
    adapters: AdapterStrengths | str | PathLike[str] | Adapter | None = None,
    *,
    base: str | Path | Base = "tiny",
    count: int = 1,
    seed: int = 0,
    on_picture: Callable[[int, Image.Image], None] | None = None,
    **options: Unpack[DrawingOptions],
) -> list[Image.Image]:
    """Draw `count` pictures of each prompt, with or without adapters.

    Args:
        prompt: one prompt, or a list of several, in the grammar of `diffgraft.Session`.
        adapters: a file, a run or an `Adapter`, or a mapping of several to their strengths, as for `graft`.
        base: name or path of a base, as for `load_base`, or a loaded `Base`. A loaded base stays on its device and in
            its dtype, and options for loading cannot be given with it.
        count: number of pictures of each prompt.
        seed: seed of the first picture of each prompt; each further picture adds 1.
        on_picture: callback that receives the index of a picture and the picture as soon as it is drawn.
        options: options of `DrawingOptions`: those of `DrawSettings`; library, wildcards; image, denoise, mask;
            precision, device, offload, and those of `load_base`.

    Returns:
        All pictures, those of the first prompt first; `Image.info` tells how each was drawn.

    Raises:
        DiffgraftError: an argument is invalid (checked before a base is loaded where possible), or an adapter does
            not fit the base.
    """
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
    ):
        raise DiffgraftError(f"Invalid prompt {short_repr(prompt)}: must be a text, or a list of texts.")
    if not isinstance(count, int) or count < 1:
        raise DiffgraftError(f"Invalid value count={short_repr(count)}: must be at least 1.")
    (seed,) = checked_seeds([seed])
    with _opened("generate", adapters, base, options) as (session, settings, image_input):
        return session.draw(prompt, range(seed, seed + count), settings, image_input, on_picture)


@wrap_system_errors
def sheet(
    prompt: str,
    axes: Sequence[Any],
    adapters: AdapterStrengths | str | PathLike[str] | Adapter | None = None,
    *,
    base: str | Path | Base = "tiny",
    seed: int = 0,
    **options: Unpack[DrawingOptions],
) -> Image.Image:
    """Draw all combinations of one to three axes (an X/Y/Z plot), with labels.

    Args:
        prompt: prompt of all pictures.
        axes: one to three axes, such as ``"steps=10,20,30"`` or ``"dog=0.4,0.8"``: see
            `diffgraft.generation.sheets`. The first goes to the right, the second downwards, the third in sheets.
        adapters: as for `generate`; axes may change their strengths, by name.
        base: as for `generate`.
        seed: seed of all pictures, unless an axis changes it.
        options: options of `DrawingOptions`.

    Raises:
        DiffgraftError: an axis or another argument is invalid.
    """
    from diffgraft.generation.sheets import Axis, Cell, draw_sheet

    if isinstance(axes, str):
        axes = [axes]
    read = [axis if isinstance(axis, Axis) else Axis.read(str(axis)) for axis in axes]
    with _opened("sheet", adapters, base, options) as (session, settings, image_input):
        return draw_sheet(session, Cell(prompt, seed, settings), read, image_input)


@contextmanager
def _opened(
    name: str,
    adapters: AdapterStrengths | str | PathLike[str] | Adapter | None,
    base: str | Path | Base,
    options: Mapping[str, Any],
) -> Iterator[tuple[Session, DrawSettings, ImageInput | None]]:
    """Yield a session with adapters in use, settings, and the picture to start from; `name` is that of the function."""
    check_options(name, options, DrawingOptions)
    settings = _settings(options)
    image_input = _image_input(options.get("image"), options.get("denoise"), options.get("mask"))
    control = _control_input(options)
    strengths = _by_file(adapters)
    for file in strengths:
        if not isinstance(file, Adapter) and not Path(file).expanduser().exists() and not options.get("library"):
            load_adapter(file)  # raises the error for a missing file
    target, device = _loaded(base, options)
    with Session(target, options.get("library"), options.get("wildcards")) as session:
        taken: set[str] = set()
        for file, strength in strengths.items():
            session.use(
                file, strength, _free_name(file.method if isinstance(file, Adapter) else usual_name(file), taken)
            )
        if control is not None:
            session.steer(_network(options["control_net"]), control)
        pipe = target.pipeline() if options.get("offload", "none") == "model" else None
        try:
            if pipe is not None:
                pipe.enable_model_cpu_offload(device=device)
            yield session, settings, image_input
        finally:
            if pipe is not None:
                pipe.remove_all_hooks()


def _settings(options: Mapping[str, Any]) -> DrawSettings:
    """Return the settings of drawing in the options."""
    given = {item.name: options[item.name] for item in fields(DrawSettings) if item.name in options}
    given.pop("hires", None)
    hires = {own: options[name] for name, own in _HIRES.items() if options.get(name) is not None}
    if hires and "scale" not in hires:
        name = next(name for name in _HIRES if options.get(name) is not None)
        raise DiffgraftError(f"{name}={options[name]} applies to a second pass, but hires is missing: give its scale.")
    encoding = {name: options[name] for name in ("style", "emphasis", "clip_skip") if name in options}
    if options.get("scheduler") is not None:
        given |= _of_former(str(options["scheduler"]))
    return DrawSettings(**given, hires=Hires(**hires) if hires else None, encoding=Encoding(**encoding))


def _of_former(scheduler: str) -> dict[str, str]:
    """Return sampler and schedule of the former option `scheduler`, with a warning."""
    if scheduler not in FORMER_SCHEDULERS:
        raise DiffgraftError(f"Invalid value scheduler={scheduler!r}: {did_you_mean(scheduler, FORMER_SCHEDULERS)}")
    sampler, schedule = FORMER_SCHEDULERS[scheduler]
    warnings.warn(
        f"scheduler={scheduler} is now sampler={sampler!r}, schedule={schedule!r}; the old option will be removed in "
        "the next release.",
        stacklevel=4,
    )
    return {"sampler": sampler, "schedule": schedule}


def _by_file(adapters: AdapterStrengths | str | PathLike[str] | Adapter | None) -> dict[str | Adapter, Any]:
    """Return file or adapter → strength."""
    if isinstance(adapters, list | tuple | set):
        raise DiffgraftError(
            f"Invalid value adapters={short_repr(adapters)}: give several with strengths, {{file: 0.8}}."
        )
    given = adapters if isinstance(adapters, Mapping) else {} if adapters is None else {adapters: 1.0}
    return {file if isinstance(file, Adapter) else os.fspath(file): strength for file, strength in given.items()}


def _free_name(name: str, taken: set[str]) -> str:
    """Return a name for an adapter that no other has, and take it."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} {number}"
    taken.add(free)
    return free


def _loaded(base: str | Path | Base, options: Mapping[str, Any]) -> tuple[Base, Any]:
    """Return the base on its device, and the device."""
    precision, device, offload = (str(options.get(name, default)) for name, default in _LOADING.items())
    if offload not in OFFLOADS:
        raise DiffgraftError(f"Invalid value offload={offload!r}: {did_you_mean(offload, OFFLOADS)}")
    load_options: Any = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
    if isinstance(base, Base):
        loading = {"precision": precision, "device": device, "offload": offload, **load_options}
        for name, value in loading.items():
            if value not in ("", "none", None):
                raise DiffgraftError(
                    f"{name}={value} is an option for loading a base, but base is already loaded: leave {name} out, or "
                    "give the base's name."
                )
        return base, base.device
    target = device_of(device)
    if offload != "none" and target.type == "cpu":
        raise DiffgraftError("offload=model needs a GPU, but the CPU computes here: leave it out.")
    warn_of_slow_bfloat16(precision, target)
    loaded = load_base(base, dtype_of(precision, target), **load_options)
    return (loaded.to(target) if offload == "none" else loaded), target


def _image_input(image: Picture | None, denoise: float | None, mask: Picture | None) -> ImageInput | None:
    if image is None:
        for name, value in (("denoise", denoise), ("mask", mask)):
            if value is not None:
                raise DiffgraftError(
                    f"{name}={value} applies to a picture to start from, but image is missing: give image as well."
                )
        return None
    for name, given in (("image", image), ("mask", mask)):
        if given is not None and not isinstance(given, str | Path | Image.Image):
            raise DiffgraftError(f"Invalid value {name}={short_repr(given)}: must be a path or a picture (PIL).")
    picture = image if isinstance(image, Image.Image) else read_picture(image)
    mask = mask if mask is None or isinstance(mask, Image.Image) else read_picture(mask, "black")
    return ImageInput(picture, 0.7 if denoise is None else denoise, mask)


def _control_input(options: Mapping[str, Any]) -> ControlInput | None:
    """Return the condition picture in the options; None if there is none."""
    given = {name: options[name] for name in ("control", "control_net", *_CONTROL) if options.get(name) is not None}
    if not given:
        return None
    for name, meaning in (("control", "condition picture"), ("control_net", "control network")):
        if name not in given:
            other = next(iter(given))
            raise DiffgraftError(f"{other} needs a {meaning}, but {name} is missing: give {name} as well.")
    picture = given["control"]
    if not isinstance(picture, str | Path | Image.Image):
        raise DiffgraftError(f"Invalid value control={short_repr(picture)}: must be a path or a picture (PIL).")
    image = picture if isinstance(picture, Image.Image) else read_picture(picture, "black")
    return ControlInput(image, **{own: given[name] for name, own in _CONTROL.items() if name in given})


def _network(given: Any) -> str | Adapter:
    """Return the control network of the option `control_net`, which may also be a `Run`."""
    if isinstance(given, Adapter):
        return given
    if not isinstance(given, str | PathLike):
        raise DiffgraftError(f"Invalid value control_net={short_repr(given)}: must be a run, a file or an adapter.")
    return os.fspath(given)
