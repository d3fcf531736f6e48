"""A session: a base that is loaded once, adapters that come and go, and pictures drawn by the grammar of prompts.

session = Session(load_base("tiny"), library="adapters/")
session.use("dog", 0.8)
pictures = session.draw("a (sks dog:1.2) [in the snow:at night:0.5] <lora:ink:0.5>", seeds=[1, 2])
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.strengths import Strength, strengths_of
from diffgraft.bases import Base
from diffgraft.bases.family import SizeConditioning
from diffgraft.bases.ldm_keys import layers_in_block
from diffgraft.bases.registry import denoisers
from diffgraft.errors import DiffgraftError, did_you_mean
from diffgraft.generation.generate import SMALL, SMALL_GUIDANCE, OverflowedPictureError, default_batch_size
from diffgraft.generation.graft import Graft
from diffgraft.generation.grammar.choices import draw_choices
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.encode import Encoding, encode_texts
from diffgraft.generation.grammar.notes import notes_on
from diffgraft.generation.grammar.schedule import schedule_of
from diffgraft.generation.grammar.tags import AdapterTag, Curve, Point, split_tags
from diffgraft.generation.guided import Guide, GuidedDenoiser, Told
from diffgraft.generation.samplers.names import named_sampler, sampler_sigmas
from diffgraft.generation.samplers.noise import NoiseSource, NoiseStream, noise_stream, start_noise
from diffgraft.progress import Note, emit, phase

_USUAL_GUIDANCE = 7.5
_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
_MOST_STEPS, _MOST_SIDE = 1000, 8192


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn."""

    size: tuple[int, int] | None = None
    """(width, height) in pixels; None: the base's native size"""
    steps: int = 25
    """Number of steps of the sampler"""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. None: 7.5, or 3 for small bases"""
    rescale: float = 0.0
    """Guidance rescale, from 0 to 1 (Lin et al. 2023, arXiv:2305.08891); 0.7 for bases with zero terminal SNR"""
    negative: str = ""
    """Negative prompt, with weights and changes between steps, but without ``AND``"""
    sampler: str = "euler"
    """Name in `diffgraft.generation.samplers.names.SAMPLERS`"""
    schedule: str | None = None
    """Name in `diffgraft.generation.samplers.schedules.SCHEDULES`; None: the one webui has for the sampler"""
    noise: NoiseSource = "cpu"
    """Whose random numbers are used: ``cpu`` as ComfyUI, ``gpu`` as webui"""
    variation_seed: int | None = None
    """Seed toward whose noise that of the pictures is turned"""
    variation_strength: float = 0.0
    """How far, from 0 to 1"""
    encoding: Encoding = field(default_factory=Encoding)
    """How prompts are read and encoded"""
    batch: int | None = None
    """Pictures in a batch; None: chosen by their size"""

    def __post_init__(self) -> None:
        """Raise DiffgraftError for values that no base can draw with."""
        named_sampler(self.sampler)
        if not 1 <= self.steps <= _MOST_STEPS:
            raise DiffgraftError(f"Invalid value steps={self.steps}: must be 1 to {_MOST_STEPS}; 20 to 50 is usual.")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise DiffgraftError(
                f"Invalid value guidance={self.guidance}: must be 0 to 100; 1 is off, 5 to 9 is usual."
            )
        for name, value in (("rescale", self.rescale), ("variation_strength", self.variation_strength)):
            if not 0 <= value <= 1:
                raise DiffgraftError(f"Invalid value {name}={value}: must be from 0 to 1.")


@dataclass(frozen=True)
class InUse:
    """An adapter of a session, and when it has which strength."""

    adapter: Adapter
    """A shallow copy, so that the same file may be in use twice"""
    strength: Strength = 1.0
    curve: Curve = (Point(1.0, 0.0, False),)
    """Factor on the strength of the denoiser, by step"""
    start: Point | None = None
    """First moment at which it has an effect; None: from the first step"""
    end: Point | None = None
    """Moment from which on it has none; None: to the last step"""

    def at(self, step: int, steps: int) -> Strength:
        """Return the strength in a step, counted from 0; the text encoders keep theirs."""
        factor = _factor(self.curve, step, steps)
        begins, ends = (_step_of(moment, steps) for moment in (self.start, self.end))
        if (begins is not None and step < begins) or (ends is not None and step >= ends):
            factor = 0.0
        return self.strength if factor == 1 else _with_denoiser(self.strength, factor)


class Session:
    """A loaded base with adapters, which draws pictures."""

    def __init__(self, base: Base, library: str | Path | None = None, wildcards: str | Path | None = None) -> None:
        """Begin a session.

        Args:
            base: a loaded base; its weights are the same bits as before when the session ends.
            library: folder in which adapters are found by name, in its folders too.
            wildcards: folder with the lists of ``__wildcards__``.
        """
        self.base = base
        self._library = None if library is None else Path(library).expanduser()
        self._wildcards = None if wildcards is None else Path(wildcards).expanduser()
        self._graft = Graft(base)
        self._in_use: dict[str, InUse] = {}
        self._loaded: dict[tuple[Path, int, int], Adapter] = {}
        self._merged: dict[str, Strength] = {}

    @property
    def adapters(self) -> Mapping[str, InUse]:
        """Adapters in use, by name."""
        return dict(self._in_use)

    def use(self, adapter: str | Path | Adapter, strength: Strength = 1.0, name: str = "") -> None:
        """Use an adapter in all pictures from now on, or change its strength.

        Args:
            adapter: its file or name in the library, or the adapter itself.
            strength: as in `diffgraft.generation.graft.graft`.
            name: name to change or remove it by; by default the name in the library, or that of the file without its
                suffix.

        Raises:
            DiffgraftError: there is no such adapter, or it does not fit the base; nothing has changed.
        """
        found = adapter if isinstance(adapter, Adapter) else self._load(str(adapter))
        if not name:
            name = adapter.method if isinstance(adapter, Adapter) else str(adapter)
            name = Path(name).stem if Path(name).expanduser().exists() else name
        self._apply({**self._in_use, name: InUse(copy(found), strength)}, 0, 1)

    def remove(self, name: str) -> None:
        """Stop using an adapter.

        Raises:
            DiffgraftError: no adapter of this name is in use.
        """
        if name not in self._in_use:
            raise DiffgraftError(f"No adapter {name!r} is in use: {did_you_mean(name, self._in_use)}")
        self._apply({key: value for key, value in self._in_use.items() if key != name}, 0, 1)

    def close(self) -> None:
        """Remove all adapters; the base's weights are the same bits as before the session."""
        self._apply({}, 0, 1)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def draw(
        self, prompts: str | Sequence[str], seeds: Sequence[int] = (0,), settings: DrawSettings | None = None
    ) -> list[Image.Image]:
        """Draw a picture of each prompt and seed: all seeds of the first prompt first.

        Tags such as ``<lora:name:0.8>`` are in use for the pictures of their prompt, beside the session's adapters.

        Raises:
            DiffgraftError: a prompt names an unknown adapter, or this base cannot draw with these settings.
            OverflowedPictureError: latents overflowed.
        """
        settings = settings or DrawSettings()
        size = self._size(settings)
        images: list[Image.Image] = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            for text, of_text in self._by_text(prompt, seeds).items():
                images += self._draw_one(text, of_text, size, settings)
        return images

    def _by_text(self, prompt: str, seeds: Sequence[int]) -> dict[str, list[int]]:
        """Make the choices of a prompt, and return the seeds of each text in order of the first."""
        texts: dict[str, list[int]] = {}
        for seed in seeds:
            texts.setdefault(draw_choices(prompt, seed, self._wildcards), []).append(seed)
        return texts

    def _draw_one(
        self, text: str, seeds: Sequence[int], size: tuple[int, int], settings: DrawSettings
    ) -> list[Image.Image]:
        """Draw pictures of one text, whose adapters are in use meanwhile."""
        text, tags = split_tags(text)
        for sentence in notes_on(text, settings.steps, settings.encoding.style):
            emit(Note(sentence))
        before = self._in_use
        try:
            in_use = {**before, **{f"{number} {tag.name}": self._of_tag(tag) for number, tag in enumerate(tags)}}
            self._apply(in_use, 0, settings.steps)
            guide = self._guide(text, settings)
            batch = settings.batch or default_batch_size(*size)
            images = []
            starts = range(0, len(seeds), batch)
            with phase("drawing", len(starts) * settings.steps) as tracker:
                for start in starts:
                    latents = self._sample(guide, seeds[start : start + batch], size, settings, tracker)
                    images += self._decoded(latents)
            return images
        finally:
            self._apply(before, 0, 1)

    def _sample(
        self, guide: Guide, seeds: Sequence[int], size: tuple[int, int], settings: DrawSettings, tracker: Any
    ) -> Tensor:
        """Draw the latents of one batch."""
        width, height = size
        frame = SizeConditioning((height, width), (0, 0), (height, width))
        told = self.base.family.size_conditioning([frame]).get("time_ids")
        guidance = settings.guidance if settings.guidance is not None else self._usual_guidance()
        micro = None if told is None else told.to(self.base.device)
        denoise = GuidedDenoiser(self.base, [guide] * len(seeds), guidance, settings.rescale, micro)
        sampler = named_sampler(settings.sampler)
        sigmas = sampler_sigmas(sampler, settings.schedule, settings.steps, denoise.levels)
        factor = self.base.vae_scale_factor
        shape = (self.base.latents.channels, height // factor, width // factor)
        streams = [noise_stream(settings.noise, seed) for seed in seeds]
        variations = self._variations(settings, len(seeds))
        x = start_noise(streams, shape, variations, settings.variation_strength).to(self.base.device) * sigmas[0]

        def noise(_before: float, _after: float) -> Tensor:
            return torch.stack([stream.normal(shape) for stream in streams]).to(x.device)

        for step, latents in enumerate(sampler.run(denoise, x, sigmas, noise), 1):
            x = latents
            if not x.isfinite().all():
                raise OverflowedPictureError(
                    f"Latents overflowed in step {step} of {settings.steps}, so the picture would be black. Use "
                    "smaller strengths of adapters, less guidance, or float32."
                )
            tracker.advance()
            denoise.step = step
            if step < settings.steps:
                self._apply(self._in_use, step, settings.steps)
        return x

    @staticmethod
    def _variations(settings: DrawSettings, count: int) -> list[NoiseStream] | None:
        if settings.variation_seed is None:
            return None
        return [noise_stream(settings.noise, settings.variation_seed + number) for number in range(count)]

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents [n, c, h, w] to pictures."""
        spec, vae = self.base.latents, self.base.vae
        pictures = [vae.decode((row.unsqueeze(0) / spec.scale + spec.shift).to(vae.dtype)).sample[0] for row in latents]
        pixels = (torch.stack(pictures).float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def _guide(self, text: str, settings: DrawSettings) -> Guide:
        """Encode the parts and steps of a prompt, and the negative prompt."""
        parts = split_parts(text) if settings.encoding.style == "webui" else [(text, 1.0)]
        guides = [(weight, self._told(part, settings)) for part, weight in parts]
        negative = self._told(settings.negative, settings)
        if not settings.negative.strip() and "text_embeds" in negative[0].added:  # as SDXL was trained
            blank = {name: torch.zeros_like(value) for name, value in negative[0].added.items()}
            negative = [replace(negative[0], states=torch.zeros_like(negative[0].states), added=blank)]
        return Guide(guides, negative)

    def _told(self, text: str, settings: DrawSettings) -> list[Told]:
        """Encode a text, stage by stage."""
        is_webui = settings.encoding.style == "webui"
        stages = schedule_of(text, settings.steps) if is_webui else [(settings.steps, text)]
        encoded = encode_texts(self.base, [stage for _, stage in stages], settings.encoding)
        return [
            Told(until, encoded.hidden_states[row], {name: value[row] for name, value in encoded.added.items()})
            for row, (until, _) in enumerate(stages)
        ]

    def _of_tag(self, tag: AdapterTag) -> InUse:
        """Return the adapter that a tag names, with its strengths."""
        adapter = self._load(tag.name)
        if tag.kind == "hypernet" and not adapter.networks:
            raise DiffgraftError(f"{tag.name} is no hypernetwork: write <lora:{tag.name}:…> for it.")
        strength = {"text_encoder": tag.text_encoder[0].strength, **tag.blocks}
        return InUse(copy(adapter), strength, tag.denoiser, tag.start, tag.end)

    def _apply(self, in_use: dict[str, InUse], step: int, steps: int) -> None:
        """Merge the adapters at their strengths of a step."""
        strengths = {name: item.at(step, steps) for name, item in in_use.items()}
        if strengths != self._merged or any(in_use[name] is not self._in_use.get(name) for name in in_use):
            try:
                self._graft.set({item.adapter: strengths[name] for name, item in in_use.items()})
            except BaseException:  # the graft has removed all
                self._graft.set({item.adapter: self._merged[name] for name, item in self._in_use.items()})
                raise
        self._in_use, self._merged = in_use, strengths

    def _load(self, name: str) -> Adapter:
        """Read an adapter by path, or by name from the library; the same file is read once."""
        path = self._find(name)
        state = path.stat()
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._loaded:
            self._loaded[key] = load_adapter(path, layers_in_block(self.base))
        return self._loaded[key]

    def _find(self, name: str) -> Path:
        """Return the path of an adapter."""
        path = Path(name).expanduser()
        if path.exists():
            return path
        found: dict[str, Path] = {}
        if self._library is not None:
            for file in sorted(self._library.rglob("*")):
                if file.suffix in _SUFFIXES and file.is_file():
                    inside = file.relative_to(self._library)
                    for key in (inside.as_posix(), inside.with_suffix("").as_posix(), file.name, file.stem):
                        found.setdefault(key, file)
        if name in found:
            return found[name]
        where = f" in {self._library}" if self._library is not None else ""
        hint = did_you_mean(name, {file.stem for file in found.values()}) if found else "give the path of its file."
        raise DiffgraftError(f"There is no adapter {name!r}{where}: {hint}")

    def _size(self, settings: DrawSettings) -> tuple[int, int]:
        """Return (width, height) in pixels, after checking it."""
        width, height = settings.size or (self.base.resolution, self.base.resolution)
        step = math.lcm(self.base.vae_scale_factor, 8)
        if width % step or height % step or not (0 < width <= _MOST_SIDE and 0 < height <= _MOST_SIDE):
            nearest = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
            raise DiffgraftError(
                f"Invalid value size={width}x{height}: sides must be multiples of {step}, at most {_MOST_SIDE}. Use "
                f"{nearest}."
            )
        return width, height

    def _usual_guidance(self) -> float:
        return SMALL_GUIDANCE if self.base.family.native_size(self.base) <= SMALL else _USUAL_GUIDANCE


def _factor(curve: Curve, step: int, steps: int) -> float:
    """Return the strength of a curve in a step: linear between its points, and constant before and after them."""
    at = float(step) if curve[0].in_steps else step / steps
    before = max((point for point in curve if point.at <= at), key=lambda point: point.at, default=curve[0])
    after = min((point for point in curve if point.at > at), key=lambda point: point.at, default=before)
    if after.at <= before.at:
        return before.strength
    share = (at - before.at) / (after.at - before.at)
    return before.strength + max(0.0, share) * (after.strength - before.strength)


def _step_of(moment: Point | None, steps: int) -> float | None:
    if moment is None:
        return None
    return moment.at if moment.in_steps else moment.at * steps


def _with_denoiser(strength: Strength, factor: float) -> Strength:
    """Return a strength whose denoiser part is multiplied by a factor."""
    given = strengths_of("an adapter", strength)
    parts = {part: value * factor if part in denoisers() else value for part, value in given.parts.items()}
    return {**parts, **given.blocks}
