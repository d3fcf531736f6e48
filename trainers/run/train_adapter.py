"""One adapter is learnt: attached, trained, detached and saved."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import save_words
from diffgraft.adapters.method import Attached
from diffgraft.bases import Base
from diffgraft.data.texts import Texts
from diffgraft.generation.plots import grid, save_image
from diffgraft.trainers.denoiser import Denoiser, forward_process
from diffgraft.trainers.hooks.metrics import by_step
from diffgraft.trainers.hooks.samples import draw, told_of_overflow
from diffgraft.trainers.hooks.validation import Trial, held_out
from diffgraft.trainers.loop import Loop, OnTheWay
from diffgraft.trainers.objectives.batch import SampleStream
from diffgraft.trainers.objectives.objective import ObjectiveInputs
from diffgraft.trainers.objectives.registry import new_objective
from diffgraft.trainers.planning.prediction_check import odd_prediction
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.fingerprint import identity_of
from diffgraft.trainers.run.folder import Run
from diffgraft.trainers.run.header import header
from diffgraft.trainers.run.init_from import Start, hash_of, with_start
from diffgraft.trainers.runtime.offload import at_hand, not_needed, put_away, take_back
from diffgraft.trainers.runtime.shards import cut_up, held_apart, spare_unet
from diffgraft.trainers.runtime.speed import sped_up
from diffgraft.trainers.training_data.build import Materials, gather
from diffgraft.trainers.training_data.concepts import Read


def learn(
    plan: Recipe, base: Base, folder: Path, accelerator: Any, read: Read, start: Start | None, *, changed: bool
) -> Run:
    """Attach, train, detach, export: the base is afterwards as it was.

    Of several processes all come here, and do the same; one of them writes.
    """
    # the others find the class images drawn, and latents in the cache, of which each machine may have its own
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        materials = gather(plan, base, read)
    lead = accelerator.is_main_process
    if lead and (said := odd_prediction(base, materials.learnt)):
        warnings.warn(said, stacklevel=3)
    with spare_unet(plan, base), _ready(plan, base, materials, start) as (live, denoiser, away):

        def learnt() -> Adapter:
            return with_start(live.adapter(header(plan, base, loop.identity)), start)

        def keep(file: Path) -> None:
            adapter = learnt()
            if lead:
                adapter.save(file, plan.format)

        def sample(step: int, file: Path) -> None:
            base.unet.eval()
            live.eval()
            with at_hand(base, away), told_of_overflow(f"There are no samples of step {step}."):
                sheet = grid(draw(plan, base, f"samples at step {step}", count=2))
                if lead:
                    save_image(sheet, file)
            base.unet.train(plan.gradient_checkpointing)
            live.train()

        def bare(*asked: Any) -> Tensor:
            with live.bare():
                prediction: Tensor = denoiser(*asked)
            return prediction

        process, prior = forward_process(base, plan.noise, plan.timesteps, plan.loss), materials.prior
        objective = ObjectiveInputs(
            SampleStream(materials.learnt, process, plan.seed, base.device),
            SampleStream(prior, process, plan.seed, base.device, kind=1) if prior else None,
            materials.prior_weight,
            bare,
        )
        aside = materials.held_out
        held = held_out(forward_process(base), aside, plan.validation.pairs) if aside else None
        loop = Loop(
            plan,
            folder,
            identity_of(plan, base.hash, materials.digest, hash_of(plan, start), accelerator.num_processes),
            accelerator,
            denoiser,
            live,
            new_objective(plan.objective, objective),
            [
                OnTheWay(plan.sample_every, folder / "samples", ".png", sample),
                OnTheWay(plan.adapter_every, folder / "adapters", ".safetensors", lambda _, file: keep(file)),
            ],
            Trial(plan.validation, held.loss, lambda: keep(folder / "best.safetensors")) if held else None,
            changed=changed,
        )
        if lead:
            save_recipe(plan, folder / "recipe.yaml")
        metrics = loop.run()
        adapter = learnt()
    run = Run(folder, plan, by_step(metrics))
    if lead:
        run.before_after.unlink(missing_ok=True)  # that of fewer steps
        adapter.save(run.adapter_file, plan.format)
        if adapter.deltas:
            save_words(adapter, run.folder)
    return run


@contextmanager
def _ready(
    plan: Recipe, base: Base, materials: Materials, start: Start | None
) -> Iterator[tuple[Attached, Denoiser, list[str]]]:
    """Within the block the method is attached and the base is as the recipe has it; afterwards as it was.

    Yields what is attached, what the loop runs, and the parts of the base that are put away.
    """
    away: list[str] = []
    live: Attached | None = None
    try:
        live = attach(plan, base, start)
        cut_up(plan, base)
        if plan.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # it recomputes in training mode only; these UNets have no dropout
        whole = plan.long_prompts == "chunk"
        texts = Texts(base, whole=whole, keep=plan.cache)
        if materials.prompts is not None and not live.changes_text:
            texts.prepare(materials.prompts)
        denoiser = Denoiser(base, live, live.changes_text, texts, whole)
        if not live.trains_text:
            denoiser.freeze_text()
        held_apart(plan, denoiser)
        away += not_needed(base, has_texts=materials.prompts is not None and not live.changes_text)
        put_away(base, away)
        with sped_up(plan, denoiser):
            yield live, denoiser, away
    finally:
        take_back(base, away)
        if live is not None:
            live.detach()
        base.unet.disable_gradient_checkpointing()
        base.unet.eval()
