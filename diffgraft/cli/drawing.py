"""Commands that draw: generate, regenerate."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgraft.cli.console import say, shown_progress
from diffgraft.cli.options import COMPONENTS, PREDICTION, PROGRESS, ZERO_SNR

if TYPE_CHECKING:
    from PIL import Image

    from diffgraft.generation.regions import Region
    from diffgraft.generation.sheets import Axis

_SAMPLING, _PROMPTS, _SECOND, _SOURCE, _CONTROL, _LOADING, _FILES = (
    "Sampling",
    "How prompts are read",
    "Second pass at a larger size",
    "Picture to start from",
    "Condition picture",
    "Holding the base",
    "Files",
)
_FORMATS = ("png", "jpg", "webp")
BASE = typer.Option(help="`tiny`, a diffusers folder, a .safetensors checkpoint, or a hub id.")
LIBRARY = typer.Option(help="Folder in which prompts find adapters by name: <lora:name:0.8>.")


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show, in the grammar of webui.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="FILE, FILE:0.8, or by part and block FILE:unet=0.8,OUT04=0 (IN00 … M00 … OUT11); again for more.",
        ),
    ] = None,
    base: Annotated[str, BASE] = "tiny",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")] = 1,
    seed: Annotated[
        int,
        typer.Option(min=-1, max=2**31, help="Seed of the first picture; the next ones count up. -1: a random one."),
    ] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels. [default: the base's native size]")] = "",
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance; 1 turns it off. [default: 7.5, or 3 for `tiny`]"),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt: what the picture should not show.")] = "",
    sampler: Annotated[
        str, typer.Option(help="Name as in webui: Euler, Euler a, DPM++ 2M, …", rich_help_panel=_SAMPLING)
    ] = "euler",
    schedule: Annotated[
        str | None,
        typer.Option(
            help="uniform, karras, exponential, … [default: webui's for the sampler]", rich_help_panel=_SAMPLING
        ),
    ] = None,
    scheduler: Annotated[str | None, typer.Option(hidden=True)] = None,
    noise: Annotated[
        str, typer.Option(help="cpu, or gpu for the random numbers of webui.", rich_help_panel=_SAMPLING)
    ] = "cpu",
    embedded_guidance: Annotated[
        float, typer.Option(help="Guidance told to a distilled base such as FLUX.1 dev.", rich_help_panel=_SAMPLING)
    ] = 3.5,
    rescale: Annotated[float, typer.Option(help="Guidance rescale, 0 to 1.", rich_help_panel=_SAMPLING)] = 0.0,
    mimic: Annotated[
        float | None,
        typer.Option(
            help="Dynamic thresholding: the smaller guidance whose range of values is kept.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    percentile: Annotated[
        float, typer.Option(help="With --mimic: share of the values within the range.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    variation_seed: Annotated[
        int | None, typer.Option(help="Seed toward which the noise is turned.", rich_help_panel=_SAMPLING)
    ] = None,
    variation_strength: Annotated[
        float, typer.Option(help="How far it is turned, 0 to 1.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    noise_seed_delta: Annotated[
        int,
        typer.Option(
            "--noise-seed-delta",
            "--ensd",
            help="webui's ENSD: added to the seed of the noise of steps.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    library: Annotated[Path | None, typer.Option(help=LIBRARY.help, rich_help_panel=_PROMPTS)] = None,
    wildcards: Annotated[
        Path | None, typer.Option(help="Folder with the lists of __wildcards__.", rich_help_panel=_PROMPTS)
    ] = None,
    style: Annotated[str, typer.Option(help="Whose grammar: webui or comfyui.", rich_help_panel=_PROMPTS)] = "webui",
    emphasis: Annotated[
        str,
        typer.Option(
            help="How weights of words are applied: original, no-norm, ignore or none.", rich_help_panel=_PROMPTS
        ),
    ] = "original",
    clip_skip: Annotated[
        int, typer.Option(help="Layer of the text encoder, counted from the last, 1.", rich_help_panel=_PROMPTS)
    ] = 1,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt on each line; # begins a comment.", rich_help_panel=_PROMPTS),
    ] = None,
    hires: Annotated[
        float | None, typer.Option(help="Scale of a second pass (hires fix), such as 2.", rich_help_panel=_SECOND)
    ] = None,
    hires_denoise: Annotated[
        float | None, typer.Option(help="How much noise it starts from. [default: 0.7]", rich_help_panel=_SECOND)
    ] = None,
    hires_steps: Annotated[
        int | None, typer.Option(help="Number of its steps. [default: as many as the first]", rich_help_panel=_SECOND)
    ] = None,
    upscaler: Annotated[
        str | None,
        typer.Option(
            help="latent, latent nearest, latent bicubic, latent antialiased, lanczos or nearest. [default: latent]",
            rich_help_panel=_SECOND,
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture to start from (image to image).", rich_help_panel=_SOURCE)
    ] = None,
    denoise: Annotated[
        float | None,
        typer.Option(
            help="With --image: how much noise is added to it, above 0 (none) to 1 (all). [default: 0.7]",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="With --image: mask of its size, white where it is redrawn.", rich_help_panel=_SOURCE),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(help="Condition picture that steers; needs --control-net.", rich_help_panel=_CONTROL),
    ] = None,
    control_net: Annotated[
        str | None,
        typer.Option(
            help="Control network: a run of the recipe control, its file, or a ControlNet folder of diffusers.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    control_by: Annotated[
        str | None,
        typer.Option(help="edges: steer by the edges of the picture --control.", rich_help_panel=_CONTROL),
    ] = None,
    control_strength: Annotated[
        float | None, typer.Option(help="Factor on its effect. [default: 1]", rich_help_panel=_CONTROL)
    ] = None,
    control_start: Annotated[
        float | None,
        typer.Option(help="Share of the steps after which it begins. [default: 0]", rich_help_panel=_CONTROL),
    ] = None,
    control_end: Annotated[
        float | None,
        typer.Option(help="Share of the steps after which it ends. [default: 1]", rich_help_panel=_CONTROL),
    ] = None,
    predicts: Annotated[str | None, PREDICTION] = None,
    zero_snr: Annotated[bool | None, ZERO_SNR] = None,
    components: Annotated[str | None, COMPONENTS] = None,
    quantize: Annotated[
        str,
        typer.Option(
            help="Quantize the base's linear layers to fp8, int8 or nf4, which saves memory.", rich_help_panel=_LOADING
        ),
    ] = "none",
    precision: Annotated[
        str,
        typer.Option(
            help="float32, float16 or bfloat16. [default: float16 on a GPU, else float32]", rich_help_panel=_LOADING
        ),
    ] = "",
    device: Annotated[
        str,
        typer.Option(help="cuda, mps, cpu, … [default: the GPU, or cpu without one]", rich_help_panel=_LOADING),
    ] = "",
    offload: Annotated[
        str,
        typer.Option(
            help="model: keep only the computing part on the GPU; saves memory, costs a little time.",
            rich_help_panel=_LOADING,
        ),
    ] = "none",
    tiling: Annotated[
        bool,
        typer.Option(
            "--tiling", help="Decode in tiles, which saves memory for large pictures.", rich_help_panel=_LOADING
        ),
    ] = False,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="LEFT,TOP,RIGHT,BOTTOM:PROMPT or MASK.png:PROMPT: a part of the picture; again for more.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    x: Annotated[
        str,
        typer.Option("--x", help="Axis of a sheet, to the right: steps=10,20 or NAME=0.4,0.8.", rich_help_panel=_FILES),
    ] = "",
    y: Annotated[str, typer.Option("--y", help="Second axis, downwards.", rich_help_panel=_FILES)] = "",
    z: Annotated[str, typer.Option("--z", help="Third axis, in sheets.", rich_help_panel=_FILES)] = "",
    format: Annotated[str, typer.Option(help="png, jpg or webp.", rich_help_panel=_FILES)] = "png",  # noqa: A002
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures.", rich_help_panel=_FILES)
    ] = Path("pictures"),
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Draw pictures with or without adapters: text to image, image to image, or inpainting.

    For example: diffgraft generate "a sks dog in the snow" -a runs/dog/adapter.safetensors:0.8 -n 4
    """
    from diffgraft.cli.console import parse_strengths, width_height

    adapters, width_and_height = parse_strengths(adapter or []), width_height(size)
    texts = _texts(prompt, prompts)

    from diffgraft.bases.loading import load_options
    from diffgraft.draw import generate as draw
    from diffgraft.draw import sheet
    from diffgraft.errors import DiffgraftError, did_you_mean
    from diffgraft.files import check_folder
    from diffgraft.generation.metadata import save_drawing
    from diffgraft.generation.plots import grid

    if format not in _FORMATS:
        raise DiffgraftError(f"Invalid value format={format!r}: {did_you_mean(format, _FORMATS)}")
    axes = _axes(x, y, z)
    if axes and (len(texts) > 1 or count > 1):
        raise DiffgraftError(
            "A sheet is of one prompt: leave out -n and other prompts. For several seeds, add --z seed=0,1."
        )
    check_folder(output)
    first = _random_seed() if seed == -1 else seed
    options: dict[str, Any] = {
        "base": base,
        "size": width_and_height,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "sampler": sampler,
        "schedule": schedule,
        "scheduler": scheduler,
        "noise": noise,
        "embedded_guidance": embedded_guidance,
        "rescale": rescale,
        "mimic": mimic,
        "percentile": percentile,
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "noise_seed_delta": noise_seed_delta,
        "library": library,
        "wildcards": wildcards,
        "style": style,
        "emphasis": emphasis,
        "clip_skip": clip_skip,
        "hires": hires,
        "hires_denoise": hires_denoise,
        "hires_steps": hires_steps,
        "upscaler": upscaler,
        "image": image,
        "denoise": denoise,
        "mask": mask,
        "control": control,
        "control_net": control_net,
        "control_by": control_by,
        "control_strength": control_strength,
        "control_start": control_start,
        "control_end": control_end,
        "precision": precision,
        "device": device,
        "offload": offload,
        "tiling": tiling,
        "regions": tuple(map(_region, region or [])),
        **load_options(predicts, zero_snr, components, quantize),
    }

    strengths = "".join(_strength_in_name(file, value) for file, value in adapters.items())

    def keep(place: int, image: "Image.Image") -> None:
        text, number = texts[place // count], first + place % count
        say(save_drawing(image, _new_path(output, f"{_slug(text)}{strengths}-{number}", format)))

    with shown_progress(progress):
        if axes:
            drawn = sheet(texts[0], axes, adapters, seed=first, **options)
            say(save_drawing(drawn, _new_path(output, f"{_slug(texts[0])}-{first}-sheet", format)))
            return
        images = draw(texts, adapters, count=count, seed=first, on_picture=keep, **options)
    if len(images) > 1:
        rows = {
            f"{text}{' ' * texts[:row].count(text)}": images[row * count : (row + 1) * count]
            for row, text in enumerate(texts)
        }
        say(save_drawing(grid(rows), _new_path(output, f"{_slug(texts[0])}-grid", format)))


def regenerate(
    picture: Annotated[Path, typer.Argument(help="A picture that diffgraft or webui has drawn.")],
    base: Annotated[str, typer.Option(help="The base. [default: the one that the picture names]")] = "",
    components: Annotated[str | None, COMPONENTS] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", "-a", help="Adapter file, recognised by its content; again for more."),
    ] = None,
    library: Annotated[Path | None, LIBRARY] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that it started from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of that picture.")] = None,
    control: Annotated[Path | None, typer.Option(help="Picture that it was steered by.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture.")] = Path("pictures"),
    progress: Annotated[str, PROGRESS] = "auto",
) -> None:
    """Draw a picture again from what its file tells, and say what differs.

    For example: diffgraft regenerate pictures/a-dog-7.png --library runs/
    """
    from diffgraft.data.pictures import read_picture
    from diffgraft.files import check_folder
    from diffgraft.generation.metadata import save_drawing
    from diffgraft.generation.regenerate import Sources
    from diffgraft.generation.regenerate import regenerate as draw_again

    check_folder(output)
    sources = Sources(
        base or None,
        adapter or (),
        library,
        None if image is None else read_picture(image),
        None if mask is None else read_picture(mask, "black"),
        None if control is None else read_picture(control, "black"),
        components,
    )
    with shown_progress(progress):
        drawn = draw_again(picture, sources)
    for sentence in drawn.differences:
        say(sentence)
    if drawn.has_same_pixels is None:
        say("JPEG and WebP do not keep all pixels, so that they are not compared.")
    else:
        say("Its pixels are the same." if drawn.has_same_pixels else "Its pixels are not the same.")
    say(save_drawing(drawn.image, _new_path(output, f"{picture.stem}-again", "png")))


def _texts(prompt: str | None, prompts: Path | None) -> list[str]:
    """Return the prompts to draw: the given one, and those of a text file."""
    from diffgraft.errors import DiffgraftError

    if prompt is None and prompts is None:
        raise DiffgraftError('The prompt is missing: write it in quotes, such as diffgraft generate "a dog".')
    texts = [] if prompt is None else [prompt]
    if prompts is not None:
        try:
            lines = prompts.expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DiffgraftError(f"The prompts in {prompts} cannot be read: {error}.") from error
        texts += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not texts:
        raise DiffgraftError(f"{prompts} has no prompt: write one on each line.")
    return texts


def _region(text: str) -> "Region":
    """Return the region of a box or mask and a prompt."""
    from diffgraft.data.pictures import read_picture
    from diffgraft.errors import DiffgraftError
    from diffgraft.generation.regions import Region

    place, colon, prompt = text.partition(":")
    sides = place.split(",")
    try:
        left, top, right, bottom = map(float, sides)
    except ValueError:
        if not colon or not Path(place).expanduser().exists():
            raise DiffgraftError(
                f"The region {text!r} cannot be read: write left, top, right and bottom as shares of the picture, or "
                "the file of a mask, then a colon and the prompt, such as 0,0,0.5,1:a dog."
            ) from None
        return Region(prompt.strip(), mask=read_picture(place, "black"))
    return Region(prompt.strip(), (left, top, right, bottom))


def _axes(*texts: str) -> "list[Axis]":
    """Return the axes of a sheet."""
    if not any(texts):
        return []
    from diffgraft.errors import DiffgraftError
    from diffgraft.generation.sheets import Axis

    given = [text for text in texts if text]
    if given != [*texts[: len(given)]]:
        raise DiffgraftError("Axes are given in order: --x, then --y, then --z.")
    return [Axis.read(text) for text in given]


def _random_seed() -> int:
    import secrets

    return secrets.randbelow(2**31)


def _slug(text: str) -> str:
    """Return the words of a prompt, without tags, as the name of a file."""
    words = re.sub(r"<[^<>]*>", " ", text)
    slug = "-".join("".join(c if c.isalnum() else " " for c in words).split())[:60]
    return slug.encode()[:120].decode(errors="ignore").strip("-") or "picture"


def _strength_in_name(file: str, strength: object) -> str:
    """Return an adapter's name and strength for names of pictures; empty at strength 1."""
    from diffgraft.generation.adapter_library import usual_name

    return f"-{_slug(usual_name(file))}-{strength:g}" if isinstance(strength, float) and strength != 1 else ""


def _new_path(folder: Path, name: str, format: str) -> Path:  # noqa: A002
    """Return a path that is free."""
    from diffgraft.files import unique_path

    folder.mkdir(parents=True, exist_ok=True)
    return unique_path(folder / f"{name}.{format}")


COMMANDS: tuple[Callable[..., None], ...] = (generate, regenerate)
