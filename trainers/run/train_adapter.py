"""The training of one adapter: attach, train, export, detach."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from diffgraft.trainers.hooks.samples import draw_samples, draw_steered, steered_samples, warn_of_overflow
from diffgraft.trainers.hooks.text_encoder_stop import TextEncoderStopHook
from diffgraft.trainers.hooks.trackers import TrackersHook
from diffgraft.trainers.hooks.validation import ValidationHook, held_out
from diffgraft.trainers.hooks.watch import WatchHook, WatchSet
from diffgraft.trainers.loop import TrainingLoop
from diffgraft.trainers.objectives.batch import Predict, SampleStream
from diffgraft.trainers.objectives.objective import Objective, ObjectiveInputs
from diffgraft.trainers.objectives.registry import new_objective, objective_prompts, uses_vae
from diffgraft.trainers.optim.lr_scales import lr_scales
from diffgraft.trainers.optim.optimizers import new_optimizer
from diffgraft.trainers.planning.prediction_check import prediction_warning
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.groups import AdapterSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.adapter_file import AdapterFile
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.fingerprint import flatten, run_fingerprint, unexpected
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.header import adapter_header
from diffgraft.trainers.run.init_from import with_init_metadata
from diffgraft.trainers.run.under import Under
from diffgraft.trainers.runtime.checkpointing import recomputing
from diffgraft.trainers.runtime.offload import Placement, offloadable
from diffgraft.trainers.runtime.processes import check_same_step
from diffgraft.trainers.runtime.shards import denoiser_copy, ignore_in_ddp, shard_denoiser
from diffgraft.trainers.runtime.speed import sped_up
from diffgraft.trainers.state import TrainingState
from diffgraft.trainers.training_data.build import TrainingData, build_training_data, resolution_of
from diffgraft.trainers.training_data.concepts import ConceptImages


@dataclass(frozen=True)
class Earlier:
    """How a run relates to an earlier one that it continues or repeats."""

    allow_changes: bool = False
    """Whether settings that affect steps may differ from those of a resumed run"""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Entries of the fingerprint of a run that is repeated"""


@dataclass(frozen=True)
class Setup:
    """Inputs of a training run, in addition to its recipe."""

    base: Base
    placement: Placement
    """Where the parts of the base are"""
    folder: Path
    """Folder of the run"""
    accelerator: Any
    read: ConceptImages
    """Settings and pictures of each concept"""
    start: AdapterFile | None
    """Adapter that training starts from; None: initial weights"""
    under: Under
    """Adapter under the training"""
    hashes: Mapping[str, str | None]
    """`start` and `under` → hash of the file, as in a fingerprint"""
    control: Control
    """Requests of other threads: stop, sample, save"""
    earlier: Earlier

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files."""
        return bool(self.accelerator.is_main_process)


class AdapterTraining:
    """Builds everything that the training loop needs for a recipe, and runs the loop."""

    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        self.recipe, self.setup = recipe, setup

    def run(self) -> Run:
        """Attach, train, detach and export; the base is unchanged afterwards.

        Of several processes, all run this, and the main process writes the files.
        """
        recipe, setup, accelerator = self.recipe, self.setup, self.setup.accelerator
        # other processes then find class images and latents in the cache, which may be one per machine
        with accelerator.main_process_first(), accelerator.local_main_process_first(), setup.placement.turns():
            data = build_training_data(recipe.data, recipe.validation, recipe.seed, setup.base, setup.read)
        with setup.placement.turns():
            message = prediction_warning(setup.base, data.instances) if setup.is_main else ""
        if message:
            warnings.warn(message, stacklevel=3)
        with (
            denoiser_copy(recipe.shard, setup.base),
            setup.under.while_training(),
            self._attached(data) as (live, denoiser),
        ):
            fingerprint = run_fingerprint(recipe, setup.base.hash, data.digest, setup.hashes, accelerator.num_processes)
            for message in unexpected(setup.earlier.expected, fingerprint) if setup.is_main else ():
                warnings.warn(message, stacklevel=3)
            state = self._new_state(live)
            restore(setup.folder, fingerprint, state, allow_changes=setup.earlier.allow_changes)
            check_same_step(accelerator, setup.folder, state.step)
            fingerprint = with_changes(setup.folder, fingerprint)
            metrics = Metrics(setup.folder, recipe.steps, state.step, writes=setup.is_main)
            # the denoiser is where its parts have been put; accelerate would move the offloaded ones, too
            predict, state.optimizer = accelerator.prepare(denoiser, state.optimizer, device_placement=[False, True])
            export = Export(
                live, adapter_header(recipe, setup.base, fingerprint), setup.start, recipe.format, setup.is_main
            )
            trackers = TrackersHook(recipe.trackers, flatten(recipe.model_dump(mode="json")), metrics)
            hooks: list[Hook] = [
                trackers,
                GradMonitor(state.parameters, live.paths()),
                *self._validation(data, predict, metrics, export),
                *self._watch(data, predict, live),
                CheckpointHook(setup.folder, fingerprint, recipe.checkpoint_every, metrics),
                *self._samples(live, trackers),
                PeriodicArtifact("adapters", recipe.adapter_every, self._numbered("adapters", ".safetensors"), export),
                PlotHook(setup.folder / "loss.png", metrics),
            ]
            if recipe.text_encoder_stop is not None:
                hooks.append(TextEncoderStopHook(recipe.text_encoder_stop, live, denoiser))
            objective = self._objective(data, live, denoiser)
            if setup.is_main:
                save_recipe(recipe, setup.folder / "recipe.yaml")
            TrainingLoop(recipe.optim, state, predict, objective, live, metrics, hooks).run()
            trained = export.adapter()
        run = Run(setup.folder, recipe, by_step(metrics.entries))
        if setup.is_main:
            run.before_after.unlink(missing_ok=True)  # it belongs to an earlier end of the run
            trained.save(run.adapter_file, recipe.format)
            if trained.deltas:
                save_words(trained, run.folder)
        return run

    @contextmanager
    def _attached(self, data: TrainingData) -> Iterator[tuple[Attached, Denoiser]]:
        """Attach the method and prepare the base within the block; both are undone afterwards.

        Yields what is attached, and the denoiser.
        """
        recipe, base, placement = self.recipe, self.setup.base, self.setup.placement
        live: Attached | None = None
        try:
            placement.only(parts_to_attach(recipe.adapter, base))
            live = attach(recipe, base, self.setup.start)
            live.to(base.device)  # also on blocks that wait in main memory
            shard_denoiser(recipe.shard, base)
            if recipe.gradient_checkpointing:
                for network in filter(None, (base.denoiser, live.trained_network)):
                    # compiled blocks keep what they need by themselves
                    network.enable_gradient_checkpointing(None if recipe.compile else recomputing(network, live))
                    network.train()  # checkpointing works in training mode only; these networks have no dropout
            whole = recipe.long_prompts == "chunk"
            texts = TextEmbeddingCache(base, whole=whole, keep=recipe.cache)
            if data.prompts is not None and not live.affects_text_encoder:
                loss = recipe.loss
                watched = [""] if recipe.watch_every else []
                prompts = [*data.prompts, *objective_prompts(loss.objective, loss.options, data.prompts), *watched]
                with placement.turns():
                    texts.prepare(prompts)
            denoiser = Denoiser(base, live, live.affects_text_encoder, texts, whole)
            if not live.trains_text:
                denoiser.freeze_text()
            ignore_in_ddp(denoiser)
            has_texts = data.prompts is not None and not live.affects_text_encoder
            placement.all_but(offloadable(base, has_texts=has_texts, uses_vae=uses_vae(recipe.loss.objective)))
            with sped_up(recipe.runtime, base, denoiser):
                yield live, denoiser
        finally:
            placement.release()
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
        partners = SampleStream(data.partners, process, seed, base.device) if data.partners else None
        at_strength = live.at_strength if live.has_strength else None
        inputs = ObjectiveInputs(instances, classes, data.prior_weight, bare, partners, at_strength, base)
        return new_objective(self.recipe.loss.objective, inputs, self.recipe.loss.options)

    def _validation(
        self, data: TrainingData, predict: Predict, metrics: Metrics, export: "Export"
    ) -> Iterator[ValidationHook]:
        settings, best = self.recipe.validation, self.setup.folder / "best.safetensors"
        if data.held_out is not None:
            held = held_out(forward_process(self.setup.base), data.held_out, settings.pairs)
            yield ValidationHook(settings, held, predict, metrics, PeriodicArtifact("best", 0, lambda _: best, export))

    def _watch(self, data: TrainingData, predict: Predict, live: Attached) -> Iterator[WatchHook]:
        setup = self.setup
        if self.recipe.watch_every:
            watched = WatchSet(forward_process(setup.base), data.instances, data.held_out)
            pictures = [picture for _, own in setup.read for picture in own]
            yield WatchHook(self.recipe.watch_every, watched, predict, live, setup.folder, pictures)

    def _samples(self, live: Attached, trackers: TrackersHook) -> Iterator[PeriodicArtifact]:
        recipe, base = self.recipe, self.setup.base

        def sample(step: int, file: Path) -> None:
            base.denoiser.eval()
            live.eval()
            with (
                self.setup.placement.drawing(),
                self.setup.under.lifted(),
                warn_of_overflow(f"Samples of step {step} are missing."),
            ):
                side = resolution_of(recipe.data, base)
                if steered := steered_samples(self.setup.read, side):
                    images = draw_steered(steered, live.adapter({}), base, count=2)
                else:
                    images = draw_samples(recipe.samples(), side, base, f"samples at step {step}", count=2)
                if self.setup.is_main:
                    save_image(grid(images), file)
            base.denoiser.train(recipe.gradient_checkpointing)
            live.train()

        if recipe.previews:
            hook = PeriodicArtifact("samples", recipe.sample_every, self._numbered("samples", ".png"), sample)
            hook.request, hook.trackers = "sample", trackers
            yield hook

    def _numbered(self, name: str, suffix: str) -> Callable[[int], Path]:
        """Return a function that names the file of a step in the folder `name` of the run."""
        return lambda step: self.setup.folder / name / f"step-{step:06d}{suffix}"


def parts_to_attach(adapter: AdapterSettings, base: Base) -> list[str]:
    """Return the parts of a base that are on the device while a method is attached to it."""
    return [base.family.denoiser, *(base.text_encoders() if adapter.text_encoder else ())]


@dataclass(frozen=True)
class Export:
    """Exports the attached adapter to a file; all processes call it together, and the main process writes."""

    live: Attached
    metadata: Mapping[str, Any]
    start: AdapterFile | None
    format: str
    writes: bool

    def adapter(self) -> Adapter:
        """Return a copy of the attached adapter, with its header."""
        return with_init_metadata(self.live.adapter(self.metadata), self.start)

    def __call__(self, step: int, file: Path) -> None:  # noqa: ARG002
        adapter = self.adapter()
        if self.writes:
            adapter.save(file, self.format)
