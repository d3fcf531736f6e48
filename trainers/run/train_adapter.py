"""One adapter is trained: attached, trained, exported and detached."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import save_words
from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.data.text_embeddings import TextEmbeddingCache
from diffgraft.generation.plots import grid, save_image
from diffgraft.progress import Control
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.hooks.artifacts import PeriodicArtifact, PlotHook
from diffgraft.trainers.hooks.checkpoint import CheckpointHook, restore, with_changes
from diffgraft.trainers.hooks.ema import Ema
from diffgraft.trainers.hooks.health import GradMonitor
from diffgraft.trainers.hooks.hook import Hook
from diffgraft.trainers.hooks.metrics import Metrics, by_step
from diffgraft.trainers.hooks.samples import draw, warn_of_overflow
from diffgraft.trainers.hooks.text_encoder_stop import TextEncoderStopHook
from diffgraft.trainers.hooks.trackers import TrackersHook
from diffgraft.trainers.hooks.validation import ValidationHook, held_out
from diffgraft.trainers.loop import Loop
from diffgraft.trainers.objectives.batch import Predict, SampleStream
from diffgraft.trainers.objectives.objective import Objective, ObjectiveInputs
from diffgraft.trainers.objectives.registry import new_objective
from diffgraft.trainers.optim.lr_scales import lr_scales
from diffgraft.trainers.optim.optimizers import new_optimizer
from diffgraft.trainers.planning.prediction_check import prediction_warning
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.fingerprint import flatten, run_fingerprint
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.header import header
from diffgraft.trainers.run.init_from import InitAdapter, init_hash, with_init_metadata
from diffgraft.trainers.runtime.offload import loaded, offload, offloadable, onload
from diffgraft.trainers.runtime.processes import check_same_step
from diffgraft.trainers.runtime.shards import denoiser_copy, ignore_in_ddp, shard_denoiser
from diffgraft.trainers.runtime.speed import sped_up
from diffgraft.trainers.state import TrainingState
from diffgraft.trainers.training_data.build import TrainingData, build_training_data, resolution_of
from diffgraft.trainers.training_data.concepts import ConceptImages


@dataclass(frozen=True)
class Setup:
    """What a run trains with, beside its recipe."""

    base: Base
    folder: Path
    """The run's"""
    accelerator: Any
    read: ConceptImages
    """The pictures of each concept"""
    start: InitAdapter | None
    """What training starts from, where that is a file"""
    control: Control
    """What another thread asks of the run"""
    allow_changes: bool
    """Whether settings that decide what a step does may differ from those of earlier steps"""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)


class AdapterTraining:
    """A recipe, attached to its base, with all that its loop needs."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        self.recipe, self.setup = recipe, setup

    def run(self) -> Run:
        """Attach, train, detach, export: the base is afterwards as it was.

        Of several processes all come here, and do the same; one of them writes.
        """
        recipe, setup, accelerator = self.recipe, self.setup, self.setup.accelerator
        # the others find the class images drawn, and latents in the cache, of which each machine may have its own
        with accelerator.main_process_first(), accelerator.local_main_process_first():
            data = build_training_data(recipe.data, recipe.validation, recipe.seed, setup.base, setup.read)
        if setup.is_main and (said := prediction_warning(setup.base, data.instances)):
            warnings.warn(said, stacklevel=3)
        with denoiser_copy(recipe.shard, setup.base), self._attached(data) as (live, denoiser, away):
            start = init_hash(recipe.init_from, setup.start)
            fingerprint = run_fingerprint(recipe, setup.base.hash, data.digest, start, accelerator.num_processes)
            state = self._new_state(live)
            restore(setup.folder, fingerprint, state, allow_changes=setup.allow_changes)
            check_same_step(accelerator, setup.folder, state.step)
            fingerprint = with_changes(setup.folder, fingerprint)
            metrics = Metrics(setup.folder, recipe.steps, state.step, writes=setup.is_main)
            predict, state.optimizer = accelerator.prepare(denoiser, state.optimizer)
            export = Export(live, header(recipe, setup.base, fingerprint), setup.start, recipe.format, setup.is_main)
            trackers = TrackersHook(recipe.trackers, flatten(recipe.model_dump(mode="json")), metrics)
            hooks: list[Hook] = [
                trackers,
                GradMonitor(state.parameters, live.paths()),
                *self._validation(data, predict, metrics, export),
                CheckpointHook(setup.folder, fingerprint, recipe.checkpoint_every, metrics),
                *self._samples(live, away, trackers),
                PeriodicArtifact("adapters", recipe.adapter_every, self._numbered("adapters", ".safetensors"), export),
                PlotHook(setup.folder / "loss.png", metrics),
            ]
            if recipe.text_encoder_stop is not None:
                hooks.append(TextEncoderStopHook(recipe.text_encoder_stop, live, denoiser))
            objective = self._objective(data, live, denoiser)
            if setup.is_main:
                save_recipe(recipe, setup.folder / "recipe.yaml")
            Loop(recipe.optim, state, predict, objective, live, metrics, hooks).run()
            trained = export.adapter()
        run = Run(setup.folder, recipe, by_step(metrics.entries))
        if setup.is_main:
            run.before_after.unlink(missing_ok=True)  # that of fewer steps
            trained.save(run.adapter_file, recipe.format)
            if trained.deltas:
                save_words(trained, run.folder)
        return run

    @contextmanager
    def _attached(self, data: TrainingData) -> Iterator[tuple[Attached, Denoiser, list[str]]]:
        """Within the block the method is attached and the base is as the recipe has it; afterwards as it was.

        Yields what is attached, the denoiser, and the parts of the base that are offloaded.
        """
        recipe, base = self.recipe, self.setup.base
        away: list[str] = []
        live: Attached | None = None
        try:
            live = attach(recipe, base, self.setup.start)
            shard_denoiser(recipe.shard, base)
            if recipe.gradient_checkpointing:
                base.denoiser.enable_gradient_checkpointing()
                base.denoiser.train()  # it recomputes in training mode only; these denoisers have no dropout
            whole = recipe.long_prompts == "chunk"
            texts = TextEmbeddingCache(base, whole=whole, keep=recipe.cache)
            if data.prompts is not None and not live.affects_text_encoder:
                texts.prepare(data.prompts)
            denoiser = Denoiser(base, live, live.affects_text_encoder, texts, whole)
            if not live.trains_text:
                denoiser.freeze_text()
            ignore_in_ddp(recipe.shard, denoiser)
            away += offloadable(base, has_texts=data.prompts is not None and not live.affects_text_encoder)
            offload(base, away)
            with sped_up(recipe.runtime, base, denoiser):
                yield live, denoiser, away
        finally:
            onload(base, away)
            if live is not None:
                live.detach()
            base.denoiser.disable_gradient_checkpointing()
            base.denoiser.eval()

    def _new_state(self, live: Attached) -> TrainingState:
        optim = self.recipe.optim
        parameters = {name: value for name, value in live.trainable().items() if value.requires_grad}
        optimizer = new_optimizer(optim, parameters, lr_scales(optim.lr_scale, live))
        ema = Ema(parameters, optim.ema) if optim.ema else None
        return TrainingState(optim.steps, parameters, optimizer, ema, self.setup.accelerator, self.setup.control)

    def _objective(self, data: TrainingData, live: Attached, denoiser: Denoiser) -> Objective:
        def bare(*asked: Any) -> Tensor:
            with live.disabled():
                prediction: Tensor = denoiser(*asked)
            return prediction

        base, seed = self.setup.base, self.recipe.seed
        process = forward_process(base, self.recipe.objective)
        instances = SampleStream(data.instances, process, seed, base.device)
        classes = SampleStream(data.class_images, process, seed, base.device, kind=1) if data.class_images else None
        return new_objective(self.recipe.loss.objective, ObjectiveInputs(instances, classes, data.prior_weight, bare))

    def _validation(
        self, data: TrainingData, predict: Predict, metrics: Metrics, export: "Export"
    ) -> Iterator[ValidationHook]:
        settings, best = self.recipe.validation, self.setup.folder / "best.safetensors"
        if data.held_out is not None:
            held = held_out(forward_process(self.setup.base), data.held_out, settings.pairs)
            yield ValidationHook(settings, held, predict, metrics, PeriodicArtifact("best", 0, lambda _: best, export))

    def _samples(self, live: Attached, away: Sequence[str], trackers: TrackersHook) -> Iterator[PeriodicArtifact]:
        recipe, base = self.recipe, self.setup.base

        def sample(step: int, file: Path) -> None:
            base.denoiser.eval()
            live.eval()
            with loaded(base, away), warn_of_overflow(f"There are no samples of step {step}."):
                side = resolution_of(recipe.data, base)
                sheet = grid(draw(recipe.samples(), side, base, f"samples at step {step}", count=2))
                if self.setup.is_main:
                    save_image(sheet, file)
            base.denoiser.train(recipe.gradient_checkpointing)
            live.train()

        if recipe.previews:
            hook = PeriodicArtifact("samples", recipe.sample_every, self._numbered("samples", ".png"), sample)
            hook.request, hook.trackers = "sample", trackers
            yield hook

    def _numbered(self, name: str, suffix: str) -> Callable[[int], Path]:
        """The file of a step in a folder of the run's."""
        return lambda step: self.setup.folder / name / f"step-{step:06d}{suffix}"


@dataclass(frozen=True)
class Export:
    """What is attached as an adapter file; all processes call it together, and one writes."""

    live: Attached
    metadata: Mapping[str, Any]
    start: InitAdapter | None
    format: str
    writes: bool

    def adapter(self) -> Adapter:
        """A copy of what is attached, with its header."""
        return with_init_metadata(self.live.adapter(self.metadata), self.start)

    def __call__(self, step: int, file: Path) -> None:  # noqa: ARG002
        adapter = self.adapter()
        if self.writes:
            adapter.save(file, self.format)
