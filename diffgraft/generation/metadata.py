"""What a picture tells about how it was drawn: webui's ``parameters``, a record of our own, and that it is generated.

In PNG files both are text chunks; in JPEG and WebP files ``parameters`` is the comment of EXIF, and the record a
property of XMP. XMP also has IPTC's digital source type ``trainedAlgorithmicMedia``, by which viewers and platforms
recognise generated pictures.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffgraft.bases import Base
from diffgraft.bases.prediction import PREDICTION_KEY, PREDICTIONS
from diffgraft.bases.registry import denoisers
from diffgraft.errors import DiffgraftError
from diffgraft.files import atomic_write, unique_path
from diffgraft.generation.samplers.names import named_sampler
from diffgraft.generation.settings import DrawSettings

PARAMETERS, RECORD = "parameters", "diffgraft"
"""Keys in `Image.info`, and names of text chunks"""

_EXIF, _COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
"""Numbers of EXIF's own table and of its user comment, and what a comment in UTF-16 begins with"""
_NAMESPACE = "urn:diffgraft:picture:1"
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" '
    f'xmlns:diffgraft="{_NAMESPACE}" diffgraft:record={{record}}/></rdf:RDF></x:xmpmeta>'
)
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""Name and value in webui's line of settings; a value with commas is a JSON text"""
_MOST_PIXELS = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}
"""Format → longest side in pixels"""
_MOST_IN_JPEG = 40_000
"""Characters of a record in a JPEG file at most: its XMP has 65,502 bytes, of which escapes take some"""
_LEAST_PAIRS = 3
"""Number of pairs from which the last line of webui's parameters counts as its settings"""


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that a picture was drawn with."""

    name: str
    """Name by which it was in use; for tags of the prompt, the name in the tag"""
    hash: str
    """`diffgraft.generation.adapter_library.content_hash` of its file; empty if it has none"""
    strength: Any = None
    """Strength, as `Session.use` takes it; None if the prompt has a tag for it"""


@dataclass(frozen=True)
class InputRecord:
    """Record of the input picture that a generated picture started from (img2img, inpainting)."""

    pixels: str
    """Hash of its pixels"""
    denoise: float
    mask: str = ""
    """Hash of its mask's pixels; empty without a mask"""


@dataclass(frozen=True)
class ControlRecord:
    """The control network and the condition picture that a picture was steered by."""

    name: str
    """Name of the network's file; empty if it has none"""
    hash: str
    """`diffgraft.generation.adapter_library.content_hash` of its file; empty if it has none"""
    pixels: str
    """Hash of the pixels of the given picture at the size that was drawn"""
    by: str | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    """These four as in `diffgraft.generation.control.ControlInput`"""


@dataclass(frozen=True)
class EditRecord:
    """How a pair of pictures was edited by attention control; the batch is the source prompt and the edited one."""

    cross: float = 0.0
    self: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    """These three as in `diffgraft.generation.attention_control.Edit`"""
    inner: int | None = None
    """Optimizer steps of the null-text inversion that the pair starts from; None: the source was drawn from noise"""

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for values of other types, as in a damaged file."""
        numbers = [self.cross, self.self, *self.weights.values(), 0 if self.inner is None else self.inner]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise TypeError("an edit has values that are no numbers")


@dataclass(frozen=True)
class DrawingRecord:
    """All that the pixels of a picture depend on."""

    batch: Sequence[tuple[str, int]]
    """Prompt and seed of each picture of its batch, which affects the last bits; choices are made"""
    place: int
    """Place of the picture in its batch"""
    settings: Mapping[str, Any]
    """`DrawSettings.changed`"""
    size: tuple[int, int]
    """(width, height) of the first pass in pixels"""
    base: str
    """Name of the base"""
    base_hash: str
    """`Base.generation_hash`"""
    loading: Mapping[str, Any]
    """`loading_of` the base"""
    adapters: Sequence[AdapterRecord] = ()
    image: InputRecord | None = None
    edit: EditRecord | None = None
    control: ControlRecord | None = None
    is_complete: bool = True
    """Whether nothing else changed the base; adapters that were merged outside of the session are not known"""
    version: str = field(default_factory=lambda: version("diffgraft"))

    @property
    def prompt(self) -> str:
        """Prompt of the picture, with its tags."""
        return self.batch[self.place][0]

    @property
    def seed(self) -> int:
        """Seed of the picture."""
        return self.batch[self.place][1]

    def to_json(self) -> str:
        """Return the record as JSON, in which each prompt of the batch stands once."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in self.batch))
        batch = [(prompts.index(prompt), seed) for prompt, seed in self.batch]
        return json.dumps({**asdict(self), "prompts": prompts, "batch": batch})

    @classmethod
    def from_json(cls, text: str) -> "DrawingRecord":
        """Return the record of `to_json`.

        Raises:
            DiffgraftError: it is no such record.
        """
        try:
            given = json.loads(text)
            prompts = [str(prompt) for prompt in given.pop("prompts")]
            batch = [(prompts[index(number)], index(seed)) for number, seed in given.pop("batch")]
            width, height = given.pop("size")
            image, edit, control = given.pop("image", None), given.pop("edit", None), given.pop("control", None)
            adapters = [AdapterRecord(**adapter) for adapter in given.pop("adapters", ())]
            record = cls(
                batch=batch,
                size=(int(width), int(height)),
                image=None if image is None else InputRecord(**image),
                edit=None if edit is None else EditRecord(**edit),
                control=None if control is None else ControlRecord(**control),
                adapters=adapters,
                **given,
            )
            names = [record.base, record.base_hash, *(text for own in adapters for text in (own.name, own.hash))]
            names += [] if record.control is None else [record.control.name, record.control.hash]
            if not all(isinstance(name, str) for name in names) or not isinstance(record.settings, Mapping):
                raise TypeError("names and settings have other types")
            record.loading["dtype"]
            record.prompt  # noqa: B018  (raises for a place outside of the batch)
            return record
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            raise DiffgraftError(f"The picture's record cannot be read ({type(error).__name__}: {error}).") from error


def loading_of(base: Base, device: torch.device) -> dict[str, Any]:
    """Return how a base is loaded: kind of the device that computes, `dtype`, and the options of `load_base`."""
    name = base.parameterization.name
    return {
        "device": device.type,
        "dtype": str(base.denoiser.dtype).removeprefix("torch."),
        "quantize": base.quantize,
        PREDICTION_KEY: name if name in PREDICTIONS else None,
        "zero_snr": base.zero_snr if name in PREDICTIONS else None,
        **({"components": base.components_from} if base.components_from else {}),
    }


def pixel_hash(image: Image.Image) -> str:
    """Return the SHA-256 of a picture's mode, size and pixels, in hexadecimal."""
    start = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(start + image.tobytes()).hexdigest()


def told_by(record: DrawingRecord) -> dict[str | tuple[int, int], Any]:
    """Return what `Image.info` tells of a picture with this record."""
    return {PARAMETERS: parameters(record), RECORD: record.to_json()}


def parameters(record: DrawingRecord) -> str:
    """Return webui's description of a picture: prompt, negative prompt, and a line of settings.

    Adapters of the session are written as tags behind the prompt. Source: webui's ``create_infotext``.
    """
    settings = DrawSettings.from_changed(record.settings)
    width, height = record.size
    values: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": named_sampler(settings.sampler).label,
        "Schedule type": "Automatic" if settings.schedule is None else schedule_label(settings.schedule),
        "CFG scale": settings.guidance,
        "Seed": record.seed,
        "Size": f"{width}x{height}",
        "Model hash": record.base_hash[:10],
        "Model": Path(record.base).stem,
        "Variation seed": settings.variation_seed if settings.variation_strength else None,
        "Variation seed strength": settings.variation_strength or None,
        "ENSD": settings.noise_seed_delta or None,
        "Denoising strength": record.image.denoise if record.image else settings.hires and settings.hires.denoise,
        "Clip skip": settings.encoding.clip_skip if settings.encoding.clip_skip > 1 else None,
        "RNG": "CPU" if settings.noise == "cpu" else None,
        "Distilled CFG Scale": record.settings.get("embedded_guidance"),
        "CFG Rescale": settings.rescale or None,
        "Dynamic thresholding enabled": settings.mimic is not None or None,
        "Mimic scale": settings.mimic,
        "Threshold percentile": 100 * settings.percentile if settings.mimic is not None else None,
    }
    if hires := settings.hires:
        values |= {
            "Hires upscale": hires.scale,
            "Hires steps": hires.steps or None,
            "Hires upscaler": _upscaler(hires.upscaler),
        }
    if settings.encoding.emphasis != "original":
        values["Emphasis"] = settings.encoding.emphasis.capitalize().replace("-", " ")
    if edit := record.edit:
        source = record.batch[0][0]
        shares = f", prompt-to-prompt with cross {edit.cross:g} and self {edit.self:g}" if len(record.batch) > 1 else ""
        values["Edit"] = f"{'source' if edit.inner is None else 'inversion'} {source!r}{shares}"
    if control := record.control:
        model = f"{control.name} [{control.hash[:8]}]" if control.hash else control.name
        values["ControlNet 0"] = (
            f"Module: {'canny' if control.by == 'edges' else 'none'}, Model: {model}, Weight: {control.strength:g}, "
            f"Guidance Start: {control.start:g}, Guidance End: {control.end:g}"
        )
    hashes = {adapter.name: adapter.hash[:12] for adapter in record.adapters if adapter.hash}
    values["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items()) or None
    values["Version"] = f"diffgraft {record.version}"
    tags = "".join(f" {_tag(adapter)}" for adapter in record.adapters if adapter.strength is not None)
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    negative = f"\nNegative prompt: {settings.negative}" if settings.negative else ""
    return f"{record.prompt}{tags}{negative}\n{line}"


def schedule_label(name: str) -> str:
    """Return webui's name of a schedule."""
    words = {"sgm": "SGM", "ddim": "DDIM", "kl": "KL", "gits": "GITS"}
    return " ".join(words.get(word, word.title()) for word in name.split())


def _upscaler(name: str) -> str:
    """Return webui's name of an upscaler: `latent bicubic` → ``Latent (bicubic)``."""
    first, _, kind = name.partition(" ")
    return f"{first.title()} ({kind})" if kind else first.title()


def _tag(adapter: AdapterRecord) -> str:
    strength = adapter.strength
    if isinstance(strength, Mapping):
        strength = next((value for part, value in strength.items() if part in denoisers()), 1)
    return f"<lora:{adapter.name}:{strength if isinstance(strength, int | float) else 1:g}>"


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Read webui's description of a picture.

    Returns:
        The prompt, the negative prompt, and the settings by their names.
    """
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], []
    settings = {name: _unquoted(value.strip()) for name, value in pairs}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    return prompt.strip(), negative.strip(), settings


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def save_drawing(image: Image.Image, path: Path) -> Path:
    """Write a picture to a file atomically, with what `Image.info` tells about how it was drawn.

    Returns:
        The file; a picture that is too large for JPEG or WebP becomes a PNG file beside `path`. JPEG files hold no
        record of more than 40,000 characters.
    """
    told, record = (str(image.info.get(key, "")) for key in (PARAMETERS, RECORD))
    if max(image.size) > _MOST_PIXELS.get(path.suffix.lower(), 2**31):
        path = unique_path(path.with_suffix(".png"))
    if path.suffix.lower() in (".jpg", ".jpeg"):  # which hold no more
        record = record if len(record) < _MOST_IN_JPEG else ""
        told = told if len(told) < _MOST_IN_JPEG // 2 else ""
    xmp = _XMP.format(record=quoteattr(record))
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".png":
        chunks = PngInfo()
        for key, text in ((PARAMETERS, told), (RECORD, record)):
            if text:
                chunks.add_itxt(key, text) if not text.isascii() else chunks.add_text(key, text)
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
        options["pnginfo"] = chunks
    else:
        exif = Image.Exif()
        if told:
            exif.get_ifd(_EXIF)[_COMMENT] = _UNICODE + told.encode("utf-16-be")
        options |= {"exif": exif, "xmp": xmp.encode(), "quality": 95}
    with atomic_write(path) as partial:
        image.save(partial, **options)
    return path


def read_record(path: Path) -> tuple[DrawingRecord | None, str]:
    """Return the record in a picture's file, None without one, and webui's parameters, empty without them.

    Raises:
        DiffgraftError: the file is no picture, or its record is damaged.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            image.load()  # text may stand behind the pixels
            told, record = (str(image.info.get(key, "")) for key in (PARAMETERS, RECORD))
            comment = image.getexif().get_ifd(_EXIF).get(_COMMENT, b"")
            if not told and isinstance(comment, bytes) and comment.startswith(_UNICODE):
                told = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
            if not record:
                record = _record_in(image.info.get("xmp", b""))
    except Exception as error:  # decoders raise many kinds of exceptions for damaged files
        raise DiffgraftError(f"{path} cannot be read as a picture ({error}).") from error
    return (DrawingRecord.from_json(record) if record else None), told


def _record_in(xmp: bytes | str) -> str:
    """Return our property in a packet of XMP, empty if there is none."""
    from xml.etree import ElementTree

    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp
    if _NAMESPACE not in text or "<!" in text:  # no declarations of entities
        return ""
    for node in ElementTree.fromstring(text).iter():
        if record := node.attrib.get(f"{{{_NAMESPACE}}}record"):
            return record
    return ""
