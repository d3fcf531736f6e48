"""A training run from a recipe to a folder with the adapter and pictures."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.data.picture_lists import save_picture_lists
from diffgraft.disk import DiskFullError
from diffgraft.errors import DiffgraftError, wrap_system_errors
from diffgraft.files import exclusive_lock, remove_partials
from diffgraft.generation.plots import save_image, save_loss_plot
from diffgraft.progress import Artifact, Control, StoppedError, emit, phase, reporting, silent
from diffgraft.progress import control as current_control
from diffgraft.trainers.hooks.checkpoint import check_same
from diffgraft.trainers.hooks.metrics import loss_curves
from diffgraft.trainers.hooks.samples import before_after, steered_samples, warn_of_overflow
from diffgraft.trainers.hooks.trackers import check_trackers
from diffgraft.trainers.objectives.registry import objective_hash
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.groups import ModelSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.adapter_file import file_hash, read_adapter_file
from diffgraft.trainers.run.attach import attach, check_format
from diffgraft.trainers.run.checks import check_base, check_family, check_pictures, check_prompts, check_settings
from diffgraft.trainers.run.fingerprint import run_fingerprint
from diffgraft.trainers.run.folder import Run, finished_run, new_run, resumed_run
from diffgraft.trainers.run.train_adapter import AdapterTraining, Earlier, Setup, parts_to_attach
from diffgraft.trainers.run.under import Under
from diffgraft.trainers.runtime.block_swap import check_swap, check_swap_frozen
from diffgraft.trainers.runtime.offload import placed
from diffgraft.trainers.runtime.processes import new_accelerator, shared_folder
from diffgraft.trainers.runtime.shards import check_frozen, check_shards
from diffgraft.trainers.training_data.build import resolution_of
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concepts

_MOST_SHOWN = 8
"""Number of training pictures in before-after.png"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@wrap_system_errors
def train(
    name: str | Path = "subject",
    /,
    *,
    base: str | Path | Base = "",
    resume: str | Path | None = None,
    allow_changes: bool = False,
    **settings: Any,
) -> Run:
    """Train an adapter, and write it with pictures, metrics and checkpoints into the folder of the run.

    Args:
        name: name of a recipe (``diffgraft recipes`` lists them), or path of a YAML file.
        base: a loaded `Base`, or name or path of a base, as for `load_base`; by default that of the recipe. A `Base`
            keeps its dtype, and has the same bits after training.
        resume: folder of an earlier run to continue, with the recipe in that folder.
        allow_changes: with `resume`, continue although base, pictures or settings that affect a step differ.
        settings: recipe keys that override the recipe, nested as ``prior={"weight": 0.5}``. With `resume` they become
            part of the recipe of the run. ``images`` may also be a list of paths and PIL images.

    Returns:
        The run; its folder has ``adapter.safetensors``, ``recipe.yaml``, ``metrics.jsonl``, ``loss.png``,
        ``before-after.png`` and ``checkpoints/``.

    Raises:
        DiffgraftError: invalid recipe, pictures or base; nothing has been trained then.
    """
    if "changed" in settings:
        warnings.warn("The argument changed is now called allow_changes; use the new name.", stacklevel=3)
        allow_changes = bool(settings.pop("changed"))
    settings = save_picture_lists(settings)
    if resume is not None:
        other = {"base": base} if isinstance(base, str | Path) and str(base) else {}
        planned = resumed_run(Path(resume).expanduser(), {**settings, **other})
    else:
        planned = new_run(name, settings | names_of(base))
    return run_recipe(planned, base, allow_changes=allow_changes)


def run_recipe(
    planned: tuple[Recipe, Path],
    base: str | Path | Base,
    *,
    allow_changes: bool = False,
    expected: Mapping[str, str] | None = None,
) -> Run:
    """Train by a recipe into a folder, as `train` does.

    Args:
        planned: recipe and folder of the run, as `new_run` and `resumed_run` return them.
        base: a loaded `Base`, or a name that the recipe has already.
        allow_changes: as for `train`.
        expected: entries of a fingerprint, such as ``data``, that the run should have; a warning names those that
            differ, before the first step.

    Raises:
        DiffgraftError: as `train`.
    """
    recipe, folder = planned
    check_trackers(recipe.trackers)  # the message of accelerate for missing trackers says less
    accelerator = new_accelerator(recipe.runtime, recipe.outputs, text_stops=recipe.text_encoder_stop is not None)
    folder = shared_folder(accelerator, folder)
    # of several processes, only the main one reports progress; it shares the requests that it receives
    control, others = current_control(), None if accelerator.is_main_process else silent
    with reporting(others, Control() if accelerator.num_processes > 1 else None):
        try:
            earlier = Earlier(allow_changes, expected or {})
            return _train(recipe, folder, base, accelerator, control, earlier)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(folder) from None  # so that the caller knows which folder to resume
        except StoppedError as error:
            has_begun = (folder / "checkpoints").exists()
            then = f"Continue with: diffgraft train --resume {folder}" if has_begun else "Nothing was trained yet."
            raise StoppedError(f"{error} {then}") from error
        except DiskFullError as error:
            has_begun = (folder / "recipe.yaml").exists()
            then = f"continue with: diffgraft train --resume {folder}" if has_begun else "start again."
            raise DiskFullError(f"{error} Then {then}") from error


def _train(
    recipe: Recipe, folder: Path, base: str | Path | Base, accelerator: Any, control: Control, earlier: Earlier
) -> Run:
    """Check all inputs, run the remaining training, and generate the pictures of the result."""
    device = accelerator.device
    check_settings(recipe.model, recipe.adapter, recipe.optim, recipe.objective, recipe.runtime, recipe.outputs, device)
    check_shards(recipe.shard, accelerator)
    recipe, read = read_concepts(recipe)
    check_pictures(read)
    check_prompts(recipe.objective, read)
    held = _base(recipe.model, recipe.precision, base)
    # the written recipe states how a base given by the caller was loaded
    recipe = recipe.model_copy(update={"quantize": held.quantize})
    check_family(recipe.groups(), held)
    check_base(recipe.data, recipe.objective, held)
    is_done = (folder / "adapter.safetensors").exists()  # a finished run no longer needs the files it was made with
    start, file = (
        None if not path or (is_done and not Path(path).exists()) else read_adapter_file(path, held)
        for path in (recipe.init_from, recipe.under.adapter)
    )
    under = Under(recipe.under, held, file)
    check_swap(recipe.block_swap, held)
    with placed(held, device, recipe.block_swap, takes_turns=recipe.shard == "none") as placement:
        if not held.family.blocks:  # `check_settings` checked the format on `tiny`, a UNet
            check_format(recipe.format, recipe.adapter, held)
        placement.only(parts_to_attach(recipe.adapter, held))
        with under.always(), under.while_training():
            live = attach(recipe, held, start)  # refuse what does not fit before anything is generated or written
            try:
                check_frozen(recipe.shard, held, live)
                check_swap_frozen(recipe.block_swap, held, live)
            finally:
                live.detach()
        with exclusive_lock(folder) if accelerator.is_main_process else nullcontext(), under.always():
            trained = {name: value for name, value in live.trainable().items() if value.requires_grad}
            hashes = {
                "start": file_hash(recipe.init_from, start),
                "under": file_hash(recipe.under.adapter, file),
                "objective": objective_hash(recipe.loss.objective, recipe.loss.options),
            }
            fingerprint = run_fingerprint(recipe, held.hash, "", hashes, accelerator.num_processes)
            done = check_same(folder, fingerprint, trained, allow_changes=earlier.allow_changes)
            if done > recipe.steps:
                raise DiffgraftError(f"The run {folder} has finished step {done} already, beyond steps={recipe.steps}.")
            run = finished_run(folder, recipe, done, allow_changes=earlier.allow_changes)
            if accelerator.is_main_process:
                remove_partials(folder)
            if run is None:
                if (
                    accelerator.is_main_process and not done
                ):  # a resumed run keeps its recipe until everything is checked
                    save_recipe(recipe, folder / "recipe.yaml")
                setup = Setup(held, placement, folder, accelerator, read, start, under, hashes, control, earlier)
                run = AdapterTraining(recipe, setup).run()
            if accelerator.is_main_process and not run.before_after.exists():
                save_loss_plot(loss_curves(run.metrics), folder / "loss.png")
                if recipe.previews:
                    side = resolution_of(recipe.data, held)
                    with placement.drawing(), warn_of_overflow("before-after.png is missing."):
                        steered = steered_samples(read, side)
                        sheet = before_after(recipe.samples(), side, held, run.adapter, _shown(read), steered)
                        emit(Artifact("samples", save_image(sheet, run.before_after), run.steps))
            accelerator.wait_for_everyone()
    return run


def names_of(base: str | Path | Base) -> dict[str, str]:
    """Return the recipe keys that name a base; none if `base` is empty."""
    if not isinstance(base, Base):
        return {"base": str(base)} if str(base) else {}
    return {"base": base.name, **({"components": base.components_from} if base.components_from else {})}


def _shown(read: ConceptImages) -> list[Image.Image]:
    """Return a few training pictures of each concept."""
    each = max(1, _MOST_SHOWN // len(read))
    return [picture.image for _, pictures in read for picture in pictures[:each]][:_MOST_SHOWN]


def _base(model: ModelSettings, precision: str, base: str | Path | Base) -> Base:
    """Return the given base, or load that of the recipe.

    Raises:
        DiffgraftError: the given base was loaded with other options than the recipe has.
    """
    if not isinstance(base, Base):
        with phase(f"loading {model.base}"):
            return load_base(model.base, DTYPES[precision], **model.load_options())
    if differing := base.differences(model.load_options()):
        raise DiffgraftError(
            f"The given base is {base!r}, but the recipe has {', '.join(differing)}. Load the base with "
            f"load_base(…, {', '.join(differing)})."
        )
    return base
