"""Pictures drawn again from what their files tell: the same pixels for our own, and as near as it goes for webui's."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.bases.loading import LoadOptions
from diffgraft.devices import device_of, dtype_of
from diffgraft.errors import DiffgraftError, short_repr, wrap_system_errors
from diffgraft.generation.adapter_library import as_path, usual_name
from diffgraft.generation.attention_control import Edit, edit
from diffgraft.generation.checks import check_prompt
from diffgraft.generation.control import ControlInput, Maker
from diffgraft.generation.grammar.encode import Emphasis, Encoding
from diffgraft.generation.grammar.tags import split_tags
from diffgraft.generation.image_input import ImageInput
from diffgraft.generation.inversion import invert, redraw
from diffgraft.generation.metadata import (
    DrawingRecord,
    EditRecord,
    loading_of,
    pixel_hash,
    read_parameters,
    read_record,
)
from diffgraft.generation.samplers.names import SAMPLERS
from diffgraft.generation.samplers.schedules import SCHEDULES
from diffgraft.generation.session import Session
from diffgraft.generation.settings import DrawSettings, Hires, Upscaler

_SHORT = 12
"""Digits of an adapter's hash that webui writes"""


@dataclass(frozen=True)
class Sources:
    """Where what a picture was drawn with is found."""

    base: str | Path | Base | None = None
    """The base; None: the one that the picture names"""
    adapters: Sequence[str | Path] = ()
    """Adapter files, which are recognised by their content"""
    library: str | Path | None = None
    """Folder of adapter files, in which they are found by content or name"""
    image: Image.Image | None = None
    """Picture that it started from"""
    mask: Image.Image | None = None
    """Mask of that picture"""
    control: Image.Image | None = None
    """Picture that it was steered by"""
    components: str | Path | None = None
    """Other components of the base, if it is the single file of a transformer; None: those that the picture names"""


@dataclass(frozen=True)
class Regenerated:
    """A picture that was generated again from its metadata, and what differs from the original."""

    image: Image.Image
    differences: list[str] = field(default_factory=list)
    """What is not as it was, one sentence each; empty if everything the file tells is the same"""
    has_same_pixels: bool | None = None
    """Whether the pixels are those of the file; None for files that do not keep all pixels, such as JPEG"""


@wrap_system_errors
def regenerate(path: str | Path, sources: Sources | None = None) -> Regenerated:
    """Draw the picture of a file again.

    Raises:
        DiffgraftError: the file does not tell how it was drawn, or something it needs is missing.
    """
    path, sources = Path(path), sources or Sources()
    record, told = read_record(path)
    if record is not None:
        drawn, differences = _from_record(path, record, sources)
    elif told:
        drawn, differences = _from_parameters(path, told, sources)
    else:
        raise DiffgraftError(f"{path} does not tell how it was drawn: it has neither a record nor webui's parameters.")
    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as before:
        is_exact = before.format == "PNG"
        pixels = np.asarray(before.convert("RGB"))
    is_same = np.array_equal(pixels, np.asarray(drawn)) if is_exact else None
    return Regenerated(drawn, differences, is_same)


def _from_record(path: Path, record: DrawingRecord, sources: Sources) -> tuple[Image.Image, list[str]]:
    """Draw the batch of a picture again, and return the picture and what differs."""
    differences: list[str] = []
    if not record.is_complete:
        differences.append(
            "The base had been changed outside of its session, or after an inversion, which the picture does not tell."
        )
    base = _base_of(record, sources)
    if base.generation_hash != record.base_hash:
        differences.append(f"It was drawn with {record.base}, and {base.name} is another base.")
    for name, value in loading_of(base, base.device).items():
        if value != record.loading.get(name):
            differences.append(f"It was drawn with {name} {record.loading.get(name)}, and the base has {value}.")
    settings = DrawSettings.from_changed({**record.settings, "batch": len(record.batch), "size": record.size})
    image = _image_input(path, record, sources)
    with Session(base, sources.library) as session:
        session.library.takes_paths = False  # a picture of somebody else names no files here
        for adapter in record.adapters:
            found = _adapter_file(session, adapter.name, adapter.hash, sources)
            if adapter.hash and session.library.hash_of(found) != adapter.hash:
                differences.append(f"{found} is another file than the adapter {adapter.name} that it was drawn with.")
            session.library.names[adapter.name] = found
            if adapter.strength is not None:
                session.use(adapter.name, adapter.strength, adapter.name)
        if record.control is not None:
            differences += _steer(path, record, session, sources)
        prompts = [_without_choices(prompt) for prompt, _ in record.batch]
        seeds = [seed for _, seed in record.batch]
        if record.edit is not None:
            return _edited(session, record.edit, prompts, seeds[0], settings, image)[record.place], differences
        return session.draw_each(prompts, seeds, settings, image)[record.place], differences


def _steer(path: Path, record: DrawingRecord, session: Session, sources: Sources) -> list[str]:
    """Steer the session by the control network and condition picture of a record, and return what differs.

    Raises:
        DiffgraftError: the picture is missing or another one, the network is missing, or the record is damaged.
    """
    told, differences = record.control, []
    assert told is not None
    if sources.control is None:
        raise DiffgraftError(
            f"{path} was steered by a condition picture, which it does not contain: give that picture by --control."
        )
    given = ControlInput(sources.control, cast(Maker, told.by), told.strength, told.start, told.end)
    if pixel_hash(given.resized(record.size)) != told.pixels:
        raise DiffgraftError(
            f"{path} was steered by another picture than the one given by --control: give the original one."
        )
    found = _adapter_file(session, told.name, told.hash, sources)
    if told.hash and session.library.hash_of(found) != told.hash:
        differences.append(f"{found} is another file than the control network {told.name} that it was drawn with.")
    session.library.names[told.name] = found
    session.steer(told.name, given)
    return differences


def _edited(
    session: Session,
    record: EditRecord,
    prompts: Sequence[str],
    seed: int,
    settings: DrawSettings,
    image: ImageInput | None,
) -> tuple[Image.Image, ...]:
    """Draw a source and its edited picture again; for an inverted picture without an edit, that picture alone.

    Raises:
        DiffgraftError: the prompts are not those of such a pair.
    """
    change = Edit(record.cross, record.self, record.weights)
    source, *edited = prompts
    if record.inner is not None and image is not None and len(edited) < 2:
        inversion = invert(session, image.image, source, settings, record.inner)
        return redraw(session, inversion, next(iter(edited), None), change)
    if record.inner is not None or len(edited) != 1:
        raise DiffgraftError(
            "The picture's record tells of an edit, but has not both its prompts: it cannot be drawn again."
        )
    return edit(session, source, edited[0], seed, change, settings, image)


def _without_choices(prompt: str) -> str:
    """Return a prompt whose braces are text: choices were made when the picture was drawn."""
    return prompt.replace("{", "\\{").replace("}", "\\}")


def _base_of(record: DrawingRecord, sources: Sources) -> Base:
    """Return the base of a record, loaded as it was; one that is not on this machine is not looked for elsewhere.

    Raises:
        DiffgraftError: there is no such base, or it cannot be loaded in this way.
    """
    if isinstance(sources.base, Base):
        return sources.base
    if sources.base is None and record.base != "tiny" and as_path(record.base) is None:
        raise DiffgraftError(
            f"The picture was drawn with the base {record.base}, which is not here: give it by --base."
        )
    options: Any = {name: value for name, value in record.loading.items() if name in LoadOptions.__annotations__}
    if "components" in options and sources.components is None and as_path(str(options["components"])) is None:
        raise DiffgraftError(
            f"The picture was drawn with components of {short_repr(options['components'])}, which are not here: give "
            "them by --components."
        )
    if sources.components is not None:
        options["components"] = sources.components
    elif sources.base is not None and not Path(sources.base).expanduser().is_file():
        options.pop("components", None)
    dtype = dtype_of(str(record.loading["dtype"]), device_of())
    return load_base(record.base if sources.base is None else sources.base, dtype, **options).to(device_of())


def _adapter_file(session: Session, name: str, wanted: str, sources: Sources) -> Path:
    """Return the file of an adapter: the one with its content, else the one with its name.

    Raises:
        DiffgraftError: there is neither.
    """
    given = [Path(file).expanduser() for file in sources.adapters]
    for file in given:
        if wanted and session.library.hash_of(file).startswith(wanted):
            return file
    if wanted and (found := session.library.with_hash(wanted)) is not None:
        return found
    for file in given:
        if usual_name(str(file)) == name:
            return file
    try:
        return session.library.find(name)
    except DiffgraftError as error:
        raise DiffgraftError(
            f"The picture was drawn with the adapter {name} ({wanted[:_SHORT] or 'without a file'}), which is not "
            "here: give its file by --adapter, named like it, or its folder by --library."
        ) from error


def _image_input(path: Path, record: DrawingRecord, sources: Sources) -> ImageInput | None:
    """Return the picture that a picture started from, at the size it was drawn at.

    Raises:
        DiffgraftError: it is missing, or another one.
    """
    if record.image is None:
        return None
    if sources.image is None:
        raise DiffgraftError(
            f"{path} was drawn from a starting picture, which it does not contain: give that picture by --image."
        )
    if record.image.mask and sources.mask is None:
        raise DiffgraftError(f"{path} was painted into a mask: give it by --mask.")
    given = ImageInput(sources.image, record.image.denoise, sources.mask if record.image.mask else None)
    resized = given.resized(record.size)
    if pixel_hash(resized.image) != record.image.pixels:
        raise DiffgraftError(
            f"{path} was drawn from another picture than the one given by --image: give the original one."
        )
    if resized.mask is not None and pixel_hash(resized.mask) != record.image.mask:
        raise DiffgraftError(f"{path} was painted into another mask than the one given by --mask.")
    return given


def _from_parameters(path: Path, told: str, sources: Sources) -> tuple[Image.Image, list[str]]:
    """Draw a picture of webui as its parameters say, and return it and what may differ."""
    prompt, negative, given = read_parameters(told)
    if "Seed" not in given or "Steps" not in given:
        raise DiffgraftError(f"{path} has parameters without seed and steps, so that it cannot be drawn again.")
    if sources.base is None:
        raise DiffgraftError(
            f"{path} was drawn with the model {given.get('Model', 'unknown')}: give its file by --base."
        )
    reader = _Settings(path, dict(given))
    settings, image = reader.read(negative), reader.image_input(sources)
    base = (
        sources.base
        if isinstance(sources.base, Base)
        else load_base(sources.base, components=sources.components).to(device_of())
    )
    differences = [f"It was drawn by another program with the model {given.get('Model', 'unknown')}."]
    differences += [f"{name}: {value} is not read." for name, value in reader.unread()]
    check_prompt(prompt)
    hashes = dict(pair.split(": ", 1) for pair in given.get("Lora hashes", "").split(", ") if ": " in pair)
    with Session(base, sources.library) as session:
        session.library.takes_paths = False
        for name in dict.fromkeys([*(tag.name for tag in split_tags(prompt)[1]), *hashes]):
            wanted = hashes.get(name, "")
            session.library.names[name] = found = _adapter_file(session, name, wanted, sources)
            if not session.library.hash_of(found).startswith(wanted):
                differences.append(f"{found} is another file than the adapter {name} that it was drawn with.")
        return session.draw(_without_choices(prompt), [reader.seed], settings, image)[0], differences


_IGNORED = {"Model", "Model hash", "Lora hashes", "Version", "Hashes"}
"""Names in webui's parameters that do not say how to draw"""


class _Settings:
    """Reader of webui's parameters."""

    def __init__(self, path: Path, given: dict[str, str]) -> None:
        self._path, self._given = path, given
        self.seed = self._number("Seed", int) or 0

    def read(self, negative: str) -> DrawSettings:
        """Return the settings.

        Raises:
            DiffgraftError: one of them is not known here.
        """
        sampler, schedule = self._sampler()
        rng, emphasis = self._given.pop("RNG", "GPU"), self._given.pop("Emphasis", "Original")
        self._given.pop("Dynamic thresholding enabled", None)
        return DrawSettings(
            size=self._size(),
            steps=self._number("Steps", int),
            guidance=self._number("CFG scale", float),
            negative=negative,
            sampler=sampler,
            schedule=schedule,
            noise="cpu" if rng == "CPU" else "gpu",
            variation_seed=self._number("Variation seed", int),
            variation_strength=self._number("Variation seed strength", float) or 0.0,
            noise_seed_delta=self._number("ENSD", int) or 0,
            embedded_guidance=self._number("Distilled CFG Scale", float) or DrawSettings.embedded_guidance,
            rescale=self._number("CFG Rescale", float) or 0.0,
            mimic=self._number("Mimic scale", float),
            percentile=(self._number("Threshold percentile", float) or 100.0) / 100,
            hires=self._hires(),
            encoding=Encoding(
                emphasis=cast(Emphasis, emphasis.lower().replace(" ", "-")),  # `Encoding` checks it
                clip_skip=self._number("Clip skip", int) or 1,
            ),
        )

    def image_input(self, sources: Sources) -> ImageInput | None:
        """Return the picture that it started from, None for text to image.

        Raises:
            DiffgraftError: it is missing.
        """
        denoise = self._number("Denoising strength", float)
        if denoise is None:
            return None
        if sources.image is None:
            raise DiffgraftError(
                f"{self._path} was drawn from a starting picture, which it does not contain: give that picture by "
                "--image."
            )
        return ImageInput(sources.image, denoise, sources.mask)

    def unread(self) -> Iterator[tuple[str, str]]:
        """Yield what `read` has not read."""
        yield from ((name, value) for name, value in self._given.items() if name not in _IGNORED)

    def _sampler(self) -> tuple[str, str | None]:
        """Return sampler and schedule; older versions write both in one, such as `DPM++ 2M Karras`."""
        name = self._given.pop("Sampler", "Euler").lower()
        schedule: str | None = self._given.pop("Schedule type", "Automatic").lower()
        for ending in SCHEDULES:
            if name not in SAMPLERS and name.endswith(f" {ending}"):
                name, schedule = name.removesuffix(f" {ending}"), ending
        return name, None if schedule == "automatic" else schedule

    def _size(self) -> tuple[int, int] | None:
        text = self._given.pop("Size", "")
        size = re.fullmatch(r"(\d+)x(\d+)", text)
        return (int(size[1]), int(size[2])) if size else None

    def _hires(self) -> Hires | None:
        scale = self._number("Hires upscale", float)
        steps, upscaler = self._number("Hires steps", int) or 0, self._given.pop("Hires upscaler", "Latent").lower()
        if scale is None:
            return None
        denoise = self._number("Denoising strength", float)
        kind = cast(Upscaler, re.sub(r"[()]", "", upscaler))  # `Hires` checks it
        return Hires(scale, denoise or 0.7, steps, kind)

    def _number(self, name: str, kind: type) -> Any:
        text = self._given.pop(name, None)
        try:
            return None if text is None else kind(text)
        except ValueError:
            raise DiffgraftError(f"{self._path} says {name}: {text}, which is no number.") from None
