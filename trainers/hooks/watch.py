"""Watch of every picture: its loss at timesteps and noise that are equal for all pictures and in every measurement."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.method import Attached
from diffgraft.data.near_duplicates import Fingerprint, fingerprint, near_duplicates
from diffgraft.data.pictures import Picture, UnreadablePictureError
from diffgraft.diffusion.forward import ForwardProcess
from diffgraft.errors import DiffgraftError
from diffgraft.progress import Artifact, Note, emit
from diffgraft.rng import normal
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.watch_findings import find
from diffgraft.trainers.hooks.watch_plot import PLOT_NAME, save_watch_plot
from diffgraft.trainers.hooks.watch_record import RECORD_NAME, WatchedPicture, WatchRecord, read_record, write_record
from diffgraft.trainers.objectives.batch import Predict
from diffgraft.trainers.state import TrainingState
from diffgraft.trainers.training_data.examples import Example, Examples

_SEED = 2027
"""Seed of the noise; independent of the recipe's, so that losses of different runs can be compared"""
_TIMESTEPS = 24
"""Number of timesteps that each picture is measured at, each with noise of its own"""
_FIRST, _LAST = 0.2, 0.9
"""Part of the schedule that is measured, between timesteps of details and those of almost pure noise: prompts and
adapters decide little there, and the losses only add noise"""
_BATCH = 8
"""Number of timesteps in one pass of the denoiser"""
_MOST_COMPARED = 2000
"""Number of pictures that are compared for near-duplicates, as each is compared with each"""


@dataclass(frozen=True)
class WatchSet:
    """The pictures of a run, each in its first crop and under its first prompt."""

    process: ForwardProcess
    trained: Examples
    held_out: Examples | None

    @property
    def members(self) -> list[tuple[Examples, Example]]:
        """Each example with the examples that it is one of, those that are trained on first."""
        groups = [self.trained, *([] if self.held_out is None else [self.held_out])]
        return [(group, example) for group in groups for example in group.examples]

    @property
    def prompts(self) -> list[str]:
        """Prompt of each picture."""
        return [example.prompt_builder.prompts()[0] for _, example in self.members]

    def pictures(self) -> tuple[WatchedPicture, ...]:
        """Return the pictures as they are recorded."""
        count = len(self.trained.examples)
        return tuple(
            WatchedPicture(name=example.name, prompt=prompt, content=example.content, is_held_out=index >= count)
            for index, ((_, example), prompt) in enumerate(zip(self.members, self.prompts, strict=True))
        )

    def measure(self, predict: Predict, device: torch.device) -> Iterator[tuple[float, float]]:
        """Yield for each picture its loss and the gain of its prompt.

        The gain is the logarithm of the error under the empty prompt over that under its own, averaged over timesteps.
        """
        for member, prompt in zip(self.members, self.prompts, strict=True):
            own, bare = (self._errors(member, text, predict, device) for text in (prompt, ""))
            yield float(own.mean()), float((bare / own).log().mean())

    @torch.no_grad()
    def _errors(self, member: tuple[Examples, Example], prompt: str, predict: Predict, device: torch.device) -> Tensor:
        """Mean squared errors of a picture at all timesteps, weighted by its mask, [timesteps], float64."""
        data, example = member
        row = example.rows[0]
        latents, frame, mask = data.encoded.latents[row][0], data.frame_of(example, row), data.encoded.masks[row]
        noise = torch.stack([normal(latents.shape, _SEED, place) for place in range(_TIMESTEPS)])
        noisy, target, times = self.process.at_timesteps(latents.expand_as(noise), noise, self._timesteps())
        parts = []
        for start in range(0, _TIMESTEPS, _BATCH):
            rows = slice(start, start + _BATCH)
            count = len(times[rows])
            prediction = predict(noisy[rows].to(device), times[rows].to(device), [prompt] * count, [frame] * count)
            parts.append((prediction.cpu() - target[rows]).double().square().mean(1))  # [rows, h, w]
        weight = torch.ones(latents.shape[-2:]) if mask is None else mask
        weight = (weight / weight.sum().clamp_min(1e-6)).double()
        return (torch.cat(parts) * weight).flatten(1).sum(1)

    def _timesteps(self) -> Tensor:
        """Timesteps evenly spread over the part of the schedule that is measured, [timesteps]."""
        count = self.process.parameterization.num_timesteps
        share = (torch.arange(_TIMESTEPS) + 0.5) / _TIMESTEPS
        return ((_FIRST + (_LAST - _FIRST) * share) * count).long()


class WatchHook(Hook):
    """Measures every picture every `every` steps, and names at the end those that stand out."""

    name = "watch"

    def __init__(
        self,
        every: int,
        watched: WatchSet,
        predict: Predict,
        adapter: Attached,
        folder: Path,
        pictures: Sequence[Picture],
    ) -> None:
        """Store what to measure.

        Args:
            every: steps between measurements.
            watched: the pictures as they are trained on.
            predict: the denoiser with the adapter.
            adapter: what is attached.
            folder: the run's folder.
            pictures: the files of the pictures, for near-duplicates and for the plot.
        """
        self.every = every
        self._watched, self._predict, self._adapter = watched, predict, adapter
        self._folder, self._pictures = folder, pictures
        self._record = WatchRecord(pictures=watched.pictures())

    def begin(self, state: TrainingState) -> None:
        """Read the measurements of an earlier part of the run."""
        file = self._folder / RECORD_NAME
        if not file.exists():
            return
        try:
            known = read_record(file)
        except DiffgraftError as error:
            warnings.warn(f"{error} The watch begins anew.", stacklevel=3)
            return
        if known.has_same_pictures(self._record):
            self._record = known.up_to(state.step)

    def is_overdue(self, state: TrainingState) -> bool:
        """Whether the first measurement, or one that an interruption has prevented, is still to be taken."""
        steps = self._record.steps
        return state.step not in steps and (not steps or state.is_due(self.every))

    def is_due(self, state: TrainingState, asked: Collection[str]) -> bool:  # noqa: ARG002
        return state.is_due(self.every) or state.step == state.steps

    def run(self, state: TrainingState) -> None:
        """Measure all pictures, on all processes alike, of which the main one writes."""
        device = state.accelerator.device
        was_training = self._adapter.training
        self._adapter.eval()  # without dropout, which would also draw random numbers
        try:
            with state.eval_weights():
                losses, gains = zip(*self._watched.measure(self._predict, device), strict=True)
        finally:
            self._adapter.train(was_training)
        if not self._record.steps:
            copies = tuple(near_duplicates(self._fingerprints()))
            self._record = self._record.model_copy(update={"near_duplicates": copies})
        self._record = self._record.with_measurement(state.step, losses, gains)
        if state.is_main:
            write_record(self._record, self._folder / RECORD_NAME)

    def _fingerprints(self) -> Iterator[tuple[str, Fingerprint]]:
        for picture in self._pictures[:_MOST_COMPARED]:
            try:
                yield picture.name, fingerprint(picture.image)
            except UnreadablePictureError:
                continue  # training leaves it out too

    def end(self, state: TrainingState) -> None:
        """Say which pictures stand out, and plot all curves."""
        if not state.is_main or not self._record.steps:
            return
        findings = find(self._record)
        write_record(self._record, self._folder / RECORD_NAME, [finding.as_json() for finding in findings])
        for finding in findings:
            emit(Note(finding.sentence, is_warning=finding.is_warning))
        plot = self._folder / PLOT_NAME
        save_watch_plot(self._record, findings, self._pictures, plot)
        emit(Artifact("watch", plot, state.step))
