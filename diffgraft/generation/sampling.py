"""One run of a sampler over a batch of pictures: its prompts, and the adapters that follow its steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffgraft.adapters.methods.aesthetic import without_tuning
from diffgraft.adapters.strengths import Strength
from diffgraft.bases import Base
from diffgraft.bases.family import SizeConditioning
from diffgraft.errors import DiffgraftError
from diffgraft.generation.control import Steering
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.encode import encode_texts
from diffgraft.generation.grammar.schedule import schedule_of
from diffgraft.generation.grammar.tags import AdapterTag, split_tags
from diffgraft.generation.guided import Area, Guidance, Guide, GuidedDenoiser, Inputs, Kept, Told, noise_levels
from diffgraft.generation.image_input import ImageInput, InitialLatents, first_step
from diffgraft.generation.in_use import AppliedAdapters, InUse
from diffgraft.generation.lanes import LaneAdapters, Lanes
from diffgraft.generation.latents import decode
from diffgraft.generation.samplers.names import named_sampler, sampler_sigmas
from diffgraft.generation.samplers.noise import BrownianPath, noise_stream, start_noise
from diffgraft.generation.settings import DrawSettings
from diffgraft.progress import Preview, Tracker, control, emit

SMALL, SMALL_GUIDANCE, USUAL_GUIDANCE = 16, 3.0, 7.5
"""Width of latents up to which a base counts as small, and the default guidance of such bases and of others: the usual
7.5 oversaturates small ones"""


class OverflowedPictureError(DiffgraftError):
    """Latents overflowed during generation, so that the picture would be black."""


def _advice(base: Base) -> str:
    """What to do about latents that overflowed, in a sentence."""
    for name, value in base.denoiser.named_parameters():
        if value.is_floating_point() and not value.isfinite().all():
            return (
                f"{name} of the {base.family.denoiser} has NaN or infinity: use smaller strengths of adapters; without "
                f"adapters, download or convert the base {base.name} again."
            )
    return "Use smaller strengths of adapters, less guidance, or float32."


@dataclass(frozen=True)
class Job:
    """A picture to generate: prompt, seed and adapters."""

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
class Progress:
    """Passes the sampling steps on to a progress tracker and a callback."""

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
class Pass:
    """A run of the sampler over a batch."""

    jobs: Sequence[Job]
    settings: DrawSettings
    size: tuple[int, int]
    """(width, height) in pixels"""
    steps: int
    start: InitialLatents | None = None
    first_pass: int | None = None
    """For the second pass of a hires fix, the number of steps of the first"""
    channels: Tensor | None = None
    """Further channels of an inpainting denoiser"""
    lanes: Sequence[Mapping[str, InUse]] = ()
    """Adapters that act on single pictures or regions"""
    steering: Steering | None = None
    """Control network with its condition picture"""


class Painter:
    """Runs samplers: draws the latents of a batch with the adapters that are applied."""

    def __init__(self, base: Base, adapters: AppliedAdapters) -> None:
        self._base, self._adapters = base, adapters

    def sample(self, work: Pass, progress: Progress) -> Tensor:
        """Draw the latents of one batch."""
        (width, height), settings, start = work.size, work.settings, work.start
        guides = self._guides(work)
        frame = SizeConditioning((height, width), (0, 0), (height, width))
        told = self._base.family.size_conditioning([frame]).get("time_ids")
        micro = None if told is None else told.to(self.device)
        kept = None
        if start is not None and start.mask is not None and work.channels is None:
            kept = Kept(start.latents, start.mask)
        lanes = Lanes(self._base.family.denoiser, self._base.denoiser) if any(work.lanes) else None
        sampler = named_sampler(settings.sampler)
        family, factor = self._base.family, self._base.vae_scale_factor
        tokens = (height // factor // family.patch) * (width // factor // family.patch)
        own = partial(family.sampling_sigmas, self._base, tokens)
        sigmas = sampler_sigmas(sampler, settings.schedule, work.steps, noise_levels(self._base), own)
        sigmas = sigmas if start is None else sigmas[first_step(start.denoise, work.steps) :]
        steered = None if work.steering is None else work.steering.for_pass(work.size, len(sigmas) - 1, factor)
        told_guidance = None
        if family.embeds_guidance(self._base):
            told_guidance = torch.tensor([settings.embedded_guidance], device=self.device)
        elif settings.embedded_guidance != DrawSettings.embedded_guidance:
            raise DiffgraftError(
                f"embedded_guidance={settings.embedded_guidance:g} has no meaning for this base, which is not "
                "distilled from guidance: set guidance."
            )
        inputs = Inputs(micro, work.channels, steered, told_guidance)
        denoise = GuidedDenoiser(self._base, guides, self.guidance(settings), inputs, kept, lanes)
        shape = (self._base.latents.channels, height // factor, width // factor)
        streams = [noise_stream(settings.noise, job.seed) for job in work.jobs]
        seed = settings.variation_seed
        variations = None if seed is None else [noise_stream(settings.noise, seed) for _ in work.jobs]
        x = start_noise(streams, shape, variations, settings.variation_strength).to(self.device) * sigmas[0]
        if start is not None and not start.starts_from_pure_noise:
            x = x + start.latents.to(x)

        seeds = [job.seed for job in work.jobs]
        if delta := settings.noise_seed_delta:
            streams = [noise_stream(settings.noise, seed + delta) for seed in seeds]
        path = BrownianPath(settings.noise, seeds, shape, sigmas) if sampler.has_path else None

        def noise(before: float, after: float) -> Tensor:
            drawn = torch.stack([stream.normal(shape) for stream in streams]) if path is None else path(before, after)
            return drawn.to(x)

        last: tuple[list[LaneAdapters], dict[str, Strength]] | None = None

        def set_lane_strengths(step: int) -> None:
            """Give the lanes their strengths in a step; whole weights are those of what is merged then."""
            nonlocal last
            own: list[LaneAdapters] = [
                [(item.adapter, item.strength_in_denoiser(step, work.steps)) for item in lane.values()]
                for lane in work.lanes
            ]
            now = (own, dict(self._adapters.strengths))
            if lanes is not None and now != last:
                lanes.set(own)
                last = now

        progress.begin()
        try:
            set_lane_strengths(0)
            for done, latents in enumerate(sampler.run(denoise, x, sigmas, noise), 1):
                x = latents
                if not x.isfinite().all():
                    raise OverflowedPictureError(
                        f"Latents overflowed in step {done} of {len(sigmas) - 1}, so the picture would be black. "
                        + _advice(self._base)
                    )
                if control().pop_request("sample") and denoise.clean is not None:
                    emit(Preview(done, tuple(decode(self._base, row) for row in denoise.clean)))
                progress.step_is_done(done)
                denoise.step = done
                if done < len(sigmas) - 1:  # a sampler computes a step when its latents are asked for
                    self._adapters.apply(self._adapters.in_use, done, work.steps)
                    set_lane_strengths(done)
        finally:
            if lanes is not None:
                lanes.remove()
        return x

    @property
    def device(self) -> torch.device:
        """The device that computes; with offloading, the one that networks are moved to."""
        hook = getattr(self._base.denoiser, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self._base.device)

    def guidance(self, settings: DrawSettings) -> Guidance:
        """Return the guidance of settings, with the base's own scale if they have none."""
        small = self._base.family.native_size(self._base) <= SMALL
        usual = self._base.family.guidance or (SMALL_GUIDANCE if small else USUAL_GUIDANCE)
        scale = usual if settings.guidance is None else settings.guidance
        return Guidance(scale, settings.rescale, settings.mimic, settings.percentile)

    def guide(self, text: str, settings: DrawSettings) -> Guide:
        """Encode a prompt without tags, and the negative prompt, with the adapters in use."""
        return self._guide(text, -1, Pass((), settings, (0, 0), settings.steps))

    def _guides(self, work: Pass) -> list[Guide]:
        """Encode the prompt of each picture, each text once, the negative prompt, and the prompts of regions."""
        height, width = (side // self._base.vae_scale_factor for side in reversed(work.size))
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

    def _guide(self, text: str, lane: int, work: Pass) -> Guide:
        """Encode a prompt and the negative prompt, by text encoders with the adapters of their lane."""
        settings, merged = work.settings, self._adapters.in_use
        of_lane = (
            {} if lane < 0 else {f"lane {name}": item.for_text_encoders() for name, item in work.lanes[lane].items()}
        )
        try:
            if of_lane:
                self._adapters.apply({**merged, **of_lane}, 0, work.steps)
            with without_tuning():
                negative = self._told(settings.negative, work)
            if not settings.negative.strip() and "text_embeds" in negative[0].added:  # as SDXL was trained
                blank = {name: torch.zeros_like(value) for name, value in negative[0].added.items()}
                negative = [replace(negative[0], states=torch.zeros_like(negative[0].states), added=blank)]
            parts = split_parts(text) if settings.encoding.style == "webui" else [(text, 1.0)]
            return Guide([(weight, self._told(part, work)) for part, weight in parts], negative, lane)
        finally:
            if of_lane:
                self._adapters.apply(merged, 0, work.steps)

    def _told(self, text: str, work: Pass) -> list[Told]:
        """Encode a text, stage by stage."""
        encoding = work.settings.encoding
        is_webui = encoding.style == "webui"
        stages = schedule_of(text, work.steps, work.first_pass) if is_webui else [(work.steps, text)]
        encoded = encode_texts(self._base, [stage for _, stage in stages], encoding)
        return [
            Told(until, encoded.hidden_states[row], {name: value[row] for name, value in encoded.added.items()})
            for row, (until, _) in enumerate(stages)
        ]


def count_sampled_steps(settings: DrawSettings, source: ImageInput | None) -> int:
    """Return the number of steps that a batch takes, in both passes."""
    steps = settings.steps
    computed = steps if source is None else steps - first_step(source.denoise, steps)
    if hires := settings.hires:
        more = hires.steps or steps
        computed += more - first_step(hires.denoise, more)
    return computed
