"""A session: a base that is loaded once, adapters that come and go, and pictures drawn by the grammar of prompts.

session = Session(load_base("tiny"), library="adapters/")
session.use("dog", 0.8)
pictures = session.draw("a (sks dog:1.2) [in the snow:at night:0.5] <lora:ink:0.5>", seeds=[1, 2])
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.strengths import Strength
from diffgraft.bases import Base
from diffgraft.bases.family import SizeConditioning
from diffgraft.bases.ldm_keys import layers_in_block
from diffgraft.bases.loading import base_of
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.generation.checks import check_prompt, checked_seeds
from diffgraft.generation.enlarge import enlarged, hires_size
from diffgraft.generation.graft import Graft, has_other_grafts
from diffgraft.generation.grammar.choices import WILDCARD, draw_choices
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.encode import encode_texts
from diffgraft.generation.grammar.notes import notes_on
from diffgraft.generation.grammar.schedule import schedule_of
from diffgraft.generation.grammar.tags import AdapterTag, split_tags
from diffgraft.generation.guided import Area, Guidance, Guide, GuidedDenoiser, Kept, Told
from diffgraft.generation.image_input import ImageInput, Start, inpainting_channels, native_size, start_of
from diffgraft.generation.in_use import InUse
from diffgraft.generation.lanes import LaneAdapters, LaneError, Lanes
from diffgraft.generation.latents import decode
from diffgraft.generation.library import AdapterLibrary, usual_name
from diffgraft.generation.metadata import (
    PARAMETERS,
    RECORD,
    AdapterRecord,
    DrawingRecord,
    InputRecord,
    loading_of,
    parameters,
    pixel_hash,
)
from diffgraft.generation.samplers.names import named_sampler, sampler_sigmas
from diffgraft.generation.samplers.noise import BrownianPath, noise_stream, start_noise
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.progress import Note, Preview, Tracker, control, emit, phase

SMALL, SMALL_GUIDANCE, USUAL_GUIDANCE = 16, 3.0, 7.5
"""Width of latents up to which a base counts as small, and the default guidance of such bases and of others: the usual
7.5 oversaturates small ones"""

_HASHES: WeakKeyDictionary[Base, str] = WeakKeyDictionary()
"""Base → its `Base.generation_hash`"""


class OverflowedPictureError(DiffgraftError):
    """Latents overflowed during generation, so that the picture would be black."""


def default_batch_size(width: int, height: int) -> int:
    """Return the number of pictures of a size in pixels that a batch holds unless `DrawSettings.batch` is set."""
    return max(1, min(32, 8 * 256 * 256 // (width * height)))


@dataclass(frozen=True)
class _Job:
    """One picture to draw."""

    number: int
    """Its place among all pictures"""
    prompt: str
    """Its prompt after choices, with tags"""
    seed: int

    lane: int = -1
    """Lane of its adapters, -1 if they are merged"""

    @property
    def text(self) -> str:
        """Prompt without tags."""
        return split_tags(self.prompt)[0]

    @property
    def tags(self) -> tuple[AdapterTag, ...]:
        """Adapters that its prompt names."""
        return split_tags(self.prompt)[1]


@dataclass(frozen=True)
class _Progress:
    """Who is told of the steps."""

    tracker: Tracker
    on_step: Callable[[int], None] | None

    def begin(self) -> None:
        """Tell that a run of the sampler begins."""
        if self.on_step is not None:
            self.on_step(0)

    def step_is_done(self, count: int) -> None:
        """Tell how many steps of the run are done."""
        self.tracker.advance()
        if self.on_step is not None:
            self.on_step(count)


@dataclass(frozen=True)
class _Pass:
    """A run of the sampler over a batch."""

    jobs: Sequence[_Job]
    settings: DrawSettings
    size: tuple[int, int]
    """(width, height) in pixels"""
    steps: int
    start: Start | None = None
    first_pass: int | None = None
    """For the second pass of a hires fix, the number of steps of the first"""
    channels: Tensor | None = None
    """Further channels of an inpainting denoiser"""
    lanes: Sequence[Mapping[str, InUse]] = ()
    """Adapters that act on single pictures or regions"""


class Session:
    """A loaded base with adapters, which draws pictures."""

    def __init__(
        self, target: Base | Any, library: str | Path | None = None, wildcards: str | Path | None = None
    ) -> None:
        """Begin a session.

        Args:
            target: a loaded base, or a diffusers pipeline of a known family; its weights are the same bits as before
                when the session ends. The networks of a pipeline are frozen, and its scheduler tells the noise levels.
            library: folder in which adapters are found by name, in its folders too.
            wildcards: folder with the lists of ``__wildcards__``.

        Raises:
            DiffgraftError: the pipeline is of no known family.
        """
        self.base = target if isinstance(target, Base) else base_of(target)
        self.library = AdapterLibrary(library, layers_in_block(self.base))
        """Files that are found by name"""
        self._wildcards = None if wildcards is None else Path(wildcards).expanduser()
        self._graft = Graft(target, beside=True)
        self._in_use: dict[str, InUse] = {}
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
            name: name to change or remove it by; by default the name in the library, that of the file without its
                suffix, or that of the folder of a run.

        Raises:
            DiffgraftError: there is no such adapter, or it does not fit the base; nothing has changed.
        """
        if isinstance(adapter, Adapter):
            item, usual = InUse(copy(adapter), _plain(strength)), adapter.method
        else:
            loaded, usual = self.library.load(str(adapter)), usual_name(str(adapter))
            item = InUse(copy(loaded.adapter), _plain(strength), source=str(adapter), hash=loaded.hash)
        self._apply({**self._in_use, name or usual: item}, 0, 1)

    def remove(self, name: str) -> None:
        """Stop using an adapter.

        Raises:
            DiffgraftError: no adapter of this name is in use.
        """
        if name not in self._in_use:
            raise DiffgraftError(f"No adapter {name!r} is in use: {did_you_mean(str(name), self._in_use)}")
        self._apply({key: value for key, value in self._in_use.items() if key != name}, 0, 1)

    def close(self) -> None:
        """Remove all adapters; the base's weights are the same bits as before the session."""
        self._apply({}, 0, 1)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the adapters in use back as they are now at the end of the block."""
        before = self._in_use
        try:
            yield
        finally:
            self._apply(before, 0, 1)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def draw(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] = (0,),
        settings: DrawSettings | None = None,
        image: ImageInput | None = None,
        keep: Callable[[int, Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a picture of each prompt and seed: all seeds of the first prompt first.

        Tags such as ``<lora:name:0.8>`` are in use for the pictures of their prompt, beside the session's adapters.

        Args:
            prompts: one prompt, or several.
            seeds: a seed for each picture of a prompt.
            settings: how they are drawn.
            image: picture that all of them start from.
            keep: callback that receives the place of a picture in the result and the picture as soon as it is drawn.

        Returns:
            The pictures; `Image.info` tells how each was drawn.

        Raises:
            DiffgraftError: a prompt names an unknown adapter, or this base cannot draw with these settings.
            OverflowedPictureError: latents overflowed.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts or ())
        if not listed:
            raise DiffgraftError(f"Invalid prompts {short_repr(prompts)}: must be a text, or a list of texts.")
        seeds = checked_seeds(seeds)
        pairs = [(prompt, seed) for prompt in listed for seed in seeds]
        return self.draw_each([prompt for prompt, _ in pairs], [seed for _, seed in pairs], settings, image, keep)

    @torch.no_grad()
    def draw_each(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings | None = None,
        image: ImageInput | None = None,
        keep: Callable[[int, Image.Image], None] | None = None,
        title: str = "drawing",
        on_step: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a picture of each prompt with its own seed; otherwise as `draw`.

        Args:
            prompts: a prompt for each picture.
            seeds: a seed for each picture, as many as prompts.
            settings: how they are drawn.
            image: picture that all of them start from.
            keep: callback that receives the place of a picture and the picture as soon as it is drawn.
            title: name of the phase under which progress is reported.
            on_step: callback that receives the number of steps of a batch that are done.
        """
        settings, seeds = settings or DrawSettings(), checked_seeds(seeds)
        if len(seeds) != len(prompts):
            raise DiffgraftError(f"There are {len(prompts)} prompts and {len(seeds)} seeds: give one for each picture.")
        for prompt in (*prompts, settings.negative, *(region.prompt for region in settings.regions)):
            check_prompt(prompt)
        if image is not None and not isinstance(image, ImageInput):
            raise DiffgraftError(f"Invalid value image={short_repr(image)}: must be an ImageInput(…).")
        if image is not None and settings.hires is not None:
            raise DiffgraftError("A hires fix begins with noise: leave out hires, or the picture to start from.")
        size = self._size(settings, image)
        source = None if image is None else image.resized(size)
        jobs = [
            _Job(number, draw_choices(prompt, seed, self._wildcards), seed)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._tell(jobs, settings)
        batch = settings.batch or default_batch_size(*size)
        batches = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
        images: list[Image.Image] = []
        with phase(title, len(batches) * _computed_steps(settings, source)) as tracker:
            progress = _Progress(tracker, on_step)
            for each in batches:
                for job, drawn in zip(each, self._draw_mixed(each, size, settings, source, progress), strict=True):
                    images.append(drawn)
                    if keep is not None:
                        keep(job.number, drawn)
        return images

    def _tell(self, jobs: Sequence[_Job], settings: DrawSettings) -> None:
        """Report what is not read as it looks, once for each prompt."""
        style = settings.encoding.style
        texts = [*(job.text for job in jobs), settings.negative, *(region.prompt for region in settings.regions)]
        for text in dict.fromkeys(split_tags(text)[0] for text in texts):
            for sentence in notes_on(text, settings.steps, style, has_second_pass=settings.hires is not None):
                emit(Note(sentence))
        if self._wildcards is None and (wildcard := WILDCARD.search(" ".join(job.prompt for job in jobs))):
            emit(Note(f"{wildcard[0]} is drawn as text, as no folder of wildcards is given."))

    def _draw_mixed(
        self,
        jobs: Sequence[_Job],
        size: tuple[int, int],
        settings: DrawSettings,
        source: ImageInput | None,
        progress: _Progress,
    ) -> list[Image.Image]:
        """Draw a batch whose prompts may name different adapters, together where these can act on single pictures."""
        sets = list(dict.fromkeys(tuple(map(str, job.tags)) for job in jobs))
        if len(sets) > 1 and not settings.regions:
            try:
                return self._draw_batch(jobs, size, settings, source, progress)
            except LaneError:
                pass
        drawn: dict[int, Image.Image] = {}
        for tags in sets:
            own = [job for job in jobs if tuple(map(str, job.tags)) == tags]
            pictures = self._draw_batch(own, size, settings, source, progress)
            drawn |= {job.number: picture for job, picture in zip(own, pictures, strict=True)}
        return [drawn[job.number] for job in jobs]

    def _draw_batch(
        self,
        jobs: Sequence[_Job],
        size: tuple[int, int],
        settings: DrawSettings,
        source: ImageInput | None,
        progress: _Progress,
    ) -> list[Image.Image]:
        """Draw pictures in one batch; adapters that all of them name are merged meanwhile."""
        before = self._in_use
        sets = {tuple(map(str, job.tags)): self._of_tags(job.tags) for job in jobs}
        merged, lanes = before, []
        if len(sets) > 1:
            lanes = list(sets.values())
            jobs = [replace(job, lane=list(sets).index(tuple(map(str, job.tags)))) for job in jobs]
        else:
            merged = {**before, **next(iter(sets.values()))}
        lanes += [self._of_tags(split_tags(region.prompt)[1]) for region in settings.regions]
        try:
            self._apply(merged, 0, settings.steps)
            start = None if source is None else start_of(self.base, source)
            channels = inpainting_channels(self.base, source)
            work = _Pass(jobs, settings, size, settings.steps, start, None, channels, lanes)
            latents = self._sample(work, progress)
            if settings.hires is not None:
                latents = self._second_pass(work, settings.hires, latents, progress)
            pictures = [decode(self.base, row, settings.tiling) for row in latents]
        finally:
            self._apply(before, 0, 1)
        if source is not None:
            pictures = [source.restore_unmasked(picture) for picture in pictures]
        used = [*merged.items(), *(item for lane in lanes for item in lane.items())]
        for picture, record in zip(pictures, self._records(jobs, settings, size, source, used), strict=True):
            picture.info = {PARAMETERS: parameters(record), RECORD: record.to_json()}
        return pictures

    def _second_pass(self, work: _Pass, hires: Hires, latents: Tensor, progress: _Progress) -> Tensor:
        """Draw the latents of a first pass again at a larger size."""
        larger, steps = hires_size(self.base, work.size, hires), hires.steps or work.steps
        start = Start(enlarged(self.base, latents, larger, hires.upscaler), hires.denoise)
        self._apply(self._in_use, 0, steps)
        again = replace(work, size=larger, steps=steps, start=start, first_pass=work.steps)
        return self._sample(again, progress)

    def _sample(self, work: _Pass, progress: _Progress) -> Tensor:
        """Draw the latents of one batch."""
        (width, height), settings, start = work.size, work.settings, work.start
        guides = self._guides(work)
        frame = SizeConditioning((height, width), (0, 0), (height, width))
        told = self.base.family.size_conditioning([frame]).get("time_ids")
        micro = None if told is None else told.to(self._device)
        kept = None
        if start is not None and start.mask is not None and work.channels is None:
            kept = Kept(start.latents, start.mask)
        lanes = Lanes(self.base.family.denoiser, self.base.denoiser) if any(work.lanes) else None
        denoise = GuidedDenoiser(self.base, guides, self.guidance(settings), micro, work.channels, kept, lanes)
        sampler = named_sampler(settings.sampler)
        sigmas = sampler_sigmas(sampler, settings.schedule, work.steps, denoise.levels)
        sigmas = sigmas if start is None else sigmas[start.first_step(work.steps) :]
        factor = self.base.vae_scale_factor
        shape = (self.base.latents.channels, height // factor, width // factor)
        streams = [noise_stream(settings.noise, job.seed) for job in work.jobs]
        seed = settings.variation_seed
        variations = None if seed is None else [noise_stream(settings.noise, seed) for _ in work.jobs]
        x = start_noise(streams, shape, variations, settings.variation_strength).to(self._device) * sigmas[0]
        if start is not None and not start.is_lost:
            x = x + start.latents.to(x)

        seeds = [job.seed for job in work.jobs]
        path = BrownianPath(settings.noise, seeds, shape, sigmas) if sampler.has_path else None

        def noise(before: float, after: float) -> Tensor:
            drawn = torch.stack([stream.normal(shape) for stream in streams]) if path is None else path(before, after)
            return drawn.to(x)

        last: tuple[list[LaneAdapters], dict[str, Strength]] | None = None
        progress.begin()
        try:
            for step in range(len(sigmas)):  # a sampler computes a step when its next latents are asked for
                now: list[LaneAdapters] = [
                    [(item.adapter, item.in_denoiser(step, work.steps)) for item in lane.values()]
                    for lane in work.lanes
                ]
                if lanes is not None and (now, self._merged) != last:  # whole weights are those of what is merged
                    lanes.set(now)
                    last = (now, dict(self._merged))
                if step == 0:
                    running = sampler.run(denoise, x, sigmas, noise)
                latents = next(running, None)
                if latents is None:
                    break
                x = latents
                if not x.isfinite().all():
                    raise OverflowedPictureError(
                        f"Latents overflowed in step {step + 1} of {len(sigmas) - 1}, so the picture would be black. "
                        "Use smaller strengths of adapters, less guidance, or float32."
                    )
                if control().pop_request("sample") and denoise.clean is not None:
                    emit(Preview(step + 1, tuple(decode(self.base, row) for row in denoise.clean)))
                progress.step_is_done(step + 1)
                denoise.step = step + 1
                if step + 1 < len(sigmas) - 1:
                    self._apply(self._in_use, step + 1, work.steps)
        finally:
            if lanes is not None:
                lanes.remove()
        return x

    @property
    def _device(self) -> torch.device:
        """The device that computes; with offloading, the one that networks are moved to."""
        hook = getattr(self.base.denoiser, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.base.device)

    def guidance(self, settings: DrawSettings) -> Guidance:
        """Return the guidance of settings, with the base's own scale if they have none."""
        usual = SMALL_GUIDANCE if self.base.family.native_size(self.base) <= SMALL else USUAL_GUIDANCE
        scale = usual if settings.guidance is None else settings.guidance
        return Guidance(scale, settings.rescale, settings.mimic, settings.percentile)

    def guide(self, text: str, settings: DrawSettings) -> Guide:
        """Encode a prompt without tags, and the negative prompt, with the adapters in use."""
        return self._guide(text, -1, _Pass((), settings, (0, 0), settings.steps))

    def _guides(self, work: _Pass) -> list[Guide]:
        """Encode the prompt of each picture, each text once, the negative prompt, and the prompts of regions."""
        height, width = (side // self.base.vae_scale_factor for side in reversed(work.size))
        regions = work.settings.regions
        first = len(work.lanes) - len(regions)
        areas = [
            Area(
                region.area(height, width),
                self._guide(split_tags(region.prompt)[0], first + place, work),
                region.alone * work.steps,
            )
            for place, region in enumerate(regions)
        ]
        guides: dict[tuple[str, int], Guide] = {}
        for job in work.jobs:
            if (job.text, job.lane) not in guides:
                guides[job.text, job.lane] = replace(self._guide(job.text, job.lane, work), areas=areas)
        return [guides[job.text, job.lane] for job in work.jobs]

    def _guide(self, text: str, lane: int, work: _Pass) -> Guide:
        """Encode a prompt and the negative prompt, by text encoders with the adapters of their lane."""
        settings, merged = work.settings, self._in_use
        of_lane = {} if lane < 0 else {f"lane {name}": item.in_text() for name, item in work.lanes[lane].items()}
        try:
            if of_lane:
                self._apply({**merged, **of_lane}, 0, work.steps)
            negative = self._told(settings.negative, work)
            if not settings.negative.strip() and "text_embeds" in negative[0].added:  # as SDXL was trained
                blank = {name: torch.zeros_like(value) for name, value in negative[0].added.items()}
                negative = [replace(negative[0], states=torch.zeros_like(negative[0].states), added=blank)]
            parts = split_parts(text) if settings.encoding.style == "webui" else [(text, 1.0)]
            return Guide([(weight, self._told(part, work)) for part, weight in parts], negative, lane)
        finally:
            if of_lane:
                self._apply(merged, 0, work.steps)

    def _told(self, text: str, work: _Pass) -> list[Told]:
        """Encode a text, stage by stage."""
        encoding = work.settings.encoding
        is_webui = encoding.style == "webui"
        stages = schedule_of(text, work.steps, work.first_pass) if is_webui else [(work.steps, text)]
        encoded = encode_texts(self.base, [stage for _, stage in stages], encoding)
        return [
            Told(until, encoded.hidden_states[row], {name: value[row] for name, value in encoded.added.items()})
            for row, (until, _) in enumerate(stages)
        ]

    def _of_tags(self, tags: Sequence[AdapterTag]) -> dict[str, InUse]:
        """Return the adapters that a prompt names, by a name that no other has."""
        return {
            f"{number} {tag.name} {id(tags)}": InUse.of_tag(tag, self.library.load(tag.name))
            for number, tag in enumerate(tags)
        }

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

    def _size(self, settings: DrawSettings, image: ImageInput | None) -> tuple[int, int]:
        """Return (width, height) in pixels, after checking it."""
        native = (self.base.resolution, self.base.resolution)
        if image is not None:
            native = native_size(self.base, image.image)
        width, height = settings.size or native
        step = math.lcm(self.base.vae_scale_factor, 8)
        if width % step or height % step:
            nearest = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
            raise DiffgraftError(
                f"Invalid value size={width}x{height}: sides must be multiples of {step}. Use {nearest}."
            )
        return width, height

    @property
    def _base_hash(self) -> str:
        """Hash of the base, computed once, as it takes a while for a large VAE; adapters do not change it."""
        if self.base not in _HASHES:
            _HASHES[self.base] = self.base.generation_hash
        return _HASHES[self.base]

    def _records(
        self,
        jobs: Sequence[_Job],
        settings: DrawSettings,
        size: tuple[int, int],
        source: ImageInput | None,
        in_use: Sequence[tuple[str, InUse]],
    ) -> Iterator[DrawingRecord]:
        """Yield the record of each picture of a batch."""
        image = None
        if source is not None:
            mask = "" if source.mask is None else pixel_hash(source.mask)
            image = InputRecord(pixel_hash(source.image), source.denoise, mask)
        resolved = replace(settings, guidance=self.guidance(settings).scale)
        adapters = [
            AdapterRecord(
                item.source if is_tag else name,
                item.hash,
                None if is_tag else item.strength,
            )
            for name, item in in_use
            for is_tag in [name not in self._in_use]
        ]
        for place in range(len(jobs)):
            yield DrawingRecord(
                [(job.prompt, job.seed) for job in jobs],
                place,
                resolved.changed(),
                size,
                self.base.name,
                self._base_hash,
                loading_of(self.base),
                adapters,
                image,
                is_complete=not has_other_grafts(self.base, self._graft),
            )


def _plain(strength: Any) -> Any:
    """Return a strength with numbers of Python instead of numpy's."""
    if isinstance(strength, Mapping):
        return {name: _plain(value) for name, value in strength.items()}
    return strength.item() if getattr(strength, "ndim", None) == 0 else strength


def _computed_steps(settings: DrawSettings, source: ImageInput | None) -> int:
    """Return the number of steps that a batch takes."""
    steps = settings.steps
    computed = steps if source is None else steps - Start(torch.empty(0), source.denoise).first_step(steps)
    if hires := settings.hires:
        more = hires.steps or steps
        computed += more - Start(torch.empty(0), hires.denoise).first_step(more)
    return computed
