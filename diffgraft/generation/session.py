"""A session: a base that is loaded once, adapters that come and go, and pictures drawn by the grammar of prompts.

session = Session(load_base("tiny"), library="adapters/")
session.use("dog", 0.8)
pictures = session.draw("a (sks dog:1.2) [in the snow:at night:0.5] <lora:ink:0.5>", seeds=[1, 2])
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.strengths import Strength
from diffgraft.bases import Base
from diffgraft.bases.ldm_keys import layers_per_block_of
from diffgraft.bases.loading import base_of
from diffgraft.errors import DiffgraftError, did_you_mean, short_repr
from diffgraft.generation.adapter_library import AdapterLibrary, usual_name
from diffgraft.generation.checks import check_prompt, checked_seeds
from diffgraft.generation.control import ControlInput, Steering, build_network, reads_base
from diffgraft.generation.enlarge import enlarged, hires_size
from diffgraft.generation.graft import has_other_grafts
from diffgraft.generation.grammar.choices import WILDCARD, draw_choices
from diffgraft.generation.grammar.notes import notes_on
from diffgraft.generation.grammar.tags import AdapterTag, split_tags
from diffgraft.generation.image_input import ImageInput, InitialLatents, inpainting_channels, native_size, start_latents
from diffgraft.generation.in_use import AppliedAdapters, InUse
from diffgraft.generation.lanes import LaneError
from diffgraft.generation.latents import decode
from diffgraft.generation.metadata import (
    AdapterRecord,
    ControlRecord,
    DrawingRecord,
    InputRecord,
    loading_of,
    pixel_hash,
    told_by,
)
from diffgraft.generation.sampling import Job, Painter, Pass, Progress, count_sampled_steps
from diffgraft.generation.settings import DrawSettings, Hires
from diffgraft.progress import Note, emit, phase

_HASHES: WeakKeyDictionary[Base, str] = WeakKeyDictionary()
"""Base → its `Base.generation_hash`"""


def default_batch_size(width: int, height: int) -> int:
    """Return the number of pictures of a size in pixels that a batch holds unless `DrawSettings.batch` is set."""
    return max(1, min(32, 8 * 256 * 256 // (width * height)))


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
        self.library = AdapterLibrary(library, layers_per_block_of(self.base))
        """Files that are found by name"""
        self._wildcards = None if wildcards is None else Path(wildcards).expanduser()
        self._applied = AppliedAdapters(target)
        self.painter = Painter(self.base, self._applied)
        """Runs samplers with the adapters in use"""
        self._steering: Steering | None = None

    @property
    def adapters(self) -> Mapping[str, InUse]:
        """Adapters in use, by name."""
        return dict(self._applied.in_use)

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
        self._applied.apply({**self._applied.in_use, name or usual: item}, 0, 1)

    def remove(self, name: str) -> None:
        """Stop using an adapter.

        Raises:
            DiffgraftError: no adapter of this name is in use.
        """
        if name not in self._applied.in_use:
            raise DiffgraftError(f"No adapter {name!r} is in use: {did_you_mean(str(name), self._applied.in_use)}")
        self._applied.apply({key: value for key, value in self._applied.in_use.items() if key != name}, 0, 1)

    def steer(self, network: str | Path | Adapter, control: ControlInput) -> None:
        """Steer all pictures from now on by a condition picture; an earlier one no longer steers.

        Args:
            network: control network: a run of the recipe `control`, its file, its name in the library, or a ControlNet
                folder of diffusers.
            control: the condition picture, and how much it steers.

        Raises:
            DiffgraftError: there is no such network, or it does not fit the base; nothing has changed.
        """
        name, adapter, digest = "", network, ""
        if not isinstance(adapter, Adapter):
            loaded, name = self.library.load(str(network)), usual_name(str(network))
            adapter, digest = loaded.adapter, loaded.hash
        name_or_method = name or f"The {adapter.method} adapter"
        with self._bare() if reads_base(adapter) else nullcontext():
            built = build_network(adapter, self.base, name_or_method, self.painter.device)
        self._steering = Steering(built, control, name, digest)

    def stop_steering(self) -> None:
        """Draw without a condition picture from now on."""
        self._steering = None

    def close(self) -> None:
        """Remove all adapters and the control network; the base's weights are the same bits as before the session."""
        self._steering = None
        self._applied.apply({}, 0, 1)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Take the session's adapters off the base within the block."""
        with self.restored():
            self._applied.apply({}, 0, 1)
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the adapters in use back as they are now at the end of the block."""
        before = self._applied.in_use
        try:
            yield
        finally:
            self._applied.apply(before, 0, 1)

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
        on_picture: Callable[[int, Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a picture of each prompt and seed: all seeds of the first prompt first.

        Tags such as ``<lora:name:0.8>`` are in use for the pictures of their prompt, beside the session's adapters.

        Args:
            prompts: one prompt, or several.
            seeds: a seed for each picture of a prompt.
            settings: how they are drawn.
            image: picture that all of them start from.
            on_picture: callback that receives the place of a picture in the result and the picture, as soon as it is
                drawn.

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
        return self.draw_each([prompt for prompt, _ in pairs], [seed for _, seed in pairs], settings, image, on_picture)

    @torch.no_grad()
    def draw_each(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: DrawSettings | None = None,
        image: ImageInput | None = None,
        on_picture: Callable[[int, Image.Image], None] | None = None,
        phase_title: str = "drawing",
        on_step: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a picture of each prompt with its own seed; otherwise as `draw`.

        Args:
            prompts: a prompt for each picture.
            seeds: a seed for each picture, as many as prompts.
            settings: how they are drawn.
            image: picture that all of them start from.
            on_picture: callback that receives the place of a picture and the picture as soon as it is drawn.
            phase_title: name of the phase under which progress is reported.
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
            Job(number, draw_choices(prompt, seed, self._wildcards), seed)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._tell(jobs, settings)
        batch = settings.batch or default_batch_size(*size)
        batches = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
        images: list[Image.Image] = []
        with phase(phase_title, len(batches) * count_sampled_steps(settings, source)) as tracker:
            progress = Progress(tracker, on_step)
            for each in batches:
                work = Pass(each, settings, size, settings.steps, steering=self._steering)
                for job, drawn in zip(each, self._draw_mixed(work, source, progress), strict=True):
                    images.append(drawn)
                    if on_picture is not None:
                        on_picture(job.number, drawn)
        return images

    def _tell(self, jobs: Sequence[Job], settings: DrawSettings) -> None:
        """Report what is not read as it looks, once for each prompt."""
        style = settings.encoding.style
        texts = [*(job.text for job in jobs), settings.negative, *(region.prompt for region in settings.regions)]
        for text in dict.fromkeys(split_tags(text)[0] for text in texts):
            for sentence in notes_on(text, settings.steps, style, has_second_pass=settings.hires is not None):
                emit(Note(sentence))
        if self._wildcards is None and (wildcard := WILDCARD.search(" ".join(job.prompt for job in jobs))):
            emit(Note(f"{wildcard[0]} is drawn as text, as no folder of wildcards is given."))

    def _draw_mixed(self, work: Pass, source: ImageInput | None, progress: Progress) -> list[Image.Image]:
        """Draw a batch whose prompts may name different adapters, together where these can act on single pictures."""
        sets = list(dict.fromkeys(_tag_set(job) for job in work.jobs))
        if len(sets) > 1 and not work.settings.regions:
            try:
                return self._draw_batch(work, source, progress)
            except LaneError:
                pass
        drawn: dict[int, Image.Image] = {}
        for tags in sets:
            own = [job for job in work.jobs if _tag_set(job) == tags]
            pictures = self._draw_batch(replace(work, jobs=own), source, progress)
            drawn |= {job.number: picture for job, picture in zip(own, pictures, strict=True)}
        return [drawn[job.number] for job in work.jobs]

    def _draw_batch(self, work: Pass, source: ImageInput | None, progress: Progress) -> list[Image.Image]:
        """Draw pictures in one batch; adapters that all of them name are merged meanwhile."""
        before, settings = self._applied.in_use, work.settings
        sets = {_tag_set(job): self._of_tags(job.tags) for job in work.jobs}
        merged, lanes, jobs = before, [], work.jobs
        if len(sets) > 1:
            lanes = list(sets.values())
            jobs = [replace(job, lane=list(sets).index(_tag_set(job))) for job in jobs]
        else:
            merged = {**before, **next(iter(sets.values()))}
        lanes += [self._of_tags(split_tags(region.prompt)[1]) for region in settings.regions]
        try:
            self._applied.apply(merged, 0, settings.steps)
            start = None if source is None else start_latents(self.base, source)
            channels = inpainting_channels(self.base, source)
            work = replace(work, jobs=jobs, start=start, channels=channels, lanes=lanes)
            latents = self.painter.sample(work, progress)
            if settings.hires is not None:
                latents = self._second_pass(work, settings.hires, latents, progress)
            pictures = [decode(self.base, row, settings.tiling) for row in latents]
        finally:
            self._applied.apply(before, 0, 1)
        if source is not None:
            pictures = [source.restore_unmasked(picture) for picture in pictures]
        used = [*merged.items(), *(item for lane in lanes for item in lane.items())]
        for picture, record in zip(pictures, self.records(work, source, used), strict=True):
            picture.info = told_by(record)
        return pictures

    def _second_pass(self, work: Pass, hires: Hires, latents: Tensor, progress: Progress) -> Tensor:
        """Draw the latents of a first pass again at a larger size."""
        larger, steps = hires_size(self.base, work.size, hires), hires.steps or work.steps
        start = InitialLatents(enlarged(self.base, latents, larger, hires.upscaler), hires.denoise)
        self._applied.apply(self._applied.in_use, 0, steps)
        again = replace(work, size=larger, steps=steps, start=start, first_pass=work.steps)
        return self.painter.sample(again, progress)

    def _of_tags(self, tags: Sequence[AdapterTag]) -> dict[str, InUse]:
        """Return the adapters that a prompt names, by place and name, as one may be named twice."""
        return {f"{place} {tag.name}": InUse.of_tag(tag, self.library.load(tag.name)) for place, tag in enumerate(tags)}

    def _size(self, settings: DrawSettings, image: ImageInput | None) -> tuple[int, int]:
        """Return (width, height) in pixels, after checking it."""
        native = (self.base.resolution, self.base.resolution)
        if image is not None:
            native = native_size(self.base, image.image)
        elif self._steering is not None:
            native = native_size(self.base, self._steering.control.image)
        width, height = settings.size or native
        step = self.base.size_step
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

    def records(
        self, work: Pass, source: ImageInput | None, in_use: Sequence[tuple[str, InUse]]
    ) -> Iterator[DrawingRecord]:
        """Yield the record of each picture of a batch."""
        image = None
        if source is not None:
            mask = "" if source.mask is None else pixel_hash(source.mask)
            image = InputRecord(pixel_hash(source.image), source.denoise, mask)
        control = None
        if (steering := work.steering) is not None:
            own = steering.control
            pixels = pixel_hash(own.resized(work.size))
            control = ControlRecord(steering.name, steering.hash, pixels, own.by, own.strength, own.start, own.end)
        adapters = [
            AdapterRecord(name, item.hash, item.strength)
            if name in self._applied.in_use
            else AdapterRecord(item.source, item.hash)
            for name, item in in_use
        ]
        record = DrawingRecord(
            [(job.prompt, job.seed) for job in work.jobs],
            0,
            replace(work.settings, guidance=self.painter.guidance(work.settings).scale).changed(),
            work.size,
            self.base.name,
            self._base_hash,
            loading_of(self.base, self.painter.device),
            adapters,
            image,
            control=control,
            is_complete=not has_other_grafts(self.base, self._applied.graft),
        )
        yield from (replace(record, place=place) for place in range(len(work.jobs)))


def _tag_set(job: Job) -> tuple[str, ...]:
    """Return the tags of a picture as texts, which compare equal where their adapters and strengths are."""
    return tuple(map(str, job.tags))


def _plain(strength: Any) -> Any:
    """Return a strength with numbers of Python instead of numpy's."""
    if isinstance(strength, Mapping):
        return {name: _plain(value) for name, value in strength.items()}
    return strength.item() if getattr(strength, "ndim", None) == 0 else strength
