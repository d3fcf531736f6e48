"""A training run from beginning to end: recipe in, a folder with an adapter and pictures out."""

import warnings
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
from diffgraft.trainers.hooks.metrics import curves
from diffgraft.trainers.hooks.samples import before_after, warn_of_overflow
from diffgraft.trainers.hooks.trackers import check_trackers
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.groups import ModelSettings
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach, check_format
from diffgraft.trainers.run.checks import check_base, check_family, check_pictures, check_settings
from diffgraft.trainers.run.fingerprint import run_fingerprint
from diffgraft.trainers.run.folder import Run, finished_run, new_run, resumed_run
from diffgraft.trainers.run.init_from import init_hash, read_init_adapter
from diffgraft.trainers.run.train_adapter import AdapterTraining, Setup
from diffgraft.trainers.runtime.processes import new_accelerator, shared_folder
from diffgraft.trainers.runtime.shards import check_frozen, check_shards
from diffgraft.trainers.training_data.build import resolution_of
from diffgraft.trainers.training_data.concepts import ConceptImages, read_concepts

_MOST_SHOWN = 8
"""Pictures that were learnt from, in before-after.png"""
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
    """Train an adapter and leave a folder with everything about it.

    Args:
        name: name of a recipe (``diffgraft recipes`` lists them), or the path of a YAML.
        base: a base, or what `load_base` takes; the recipe's own where it is not given. A `Base` keeps the precision
            of its weights, and after training has the very same bits.
        resume: the folder of an earlier run to go on with, under the recipe that stands there.
        allow_changes: with `resume`, continue although base, pictures or settings that affect a step differ.
        settings: what differs from the recipe, by key; nested keys as ``prior={"weight": 0.5}``. With `resume` they
            become part of the run's recipe. ``images`` may be a list of paths and of PIL's pictures, too.

    Returns:
        The run: ``adapter.safetensors``, ``recipe.yaml``, ``metrics.jsonl``, ``loss.png``, ``before-after.png`` and
        ``checkpoints/`` lie in its folder.

    Raises:
        DiffgraftError: invalid recipe, pictures or base; nothing has been trained then.
    """
    if "changed" in settings:
        warnings.warn("The argument changed is now called allow_changes; use the new name.", stacklevel=3)
        allow_changes = bool(settings.pop("changed"))
    settings = save_picture_lists(settings)
    if resume is not None:
        other = {"base": base} if isinstance(base, str | Path) and str(base) else {}
        recipe, folder = resumed_run(Path(resume).expanduser(), {**settings, **other})
    else:
        named = base.name if isinstance(base, Base) else str(base)
        recipe, folder = new_run(name, {**settings, "base": named} if named else settings)
    check_trackers(recipe.trackers)  # accelerate says less of those that are not there
    accelerator = new_accelerator(recipe.runtime, recipe.outputs, text_stops=recipe.text_encoder_stop is not None)
    folder = shared_folder(accelerator, folder)
    # of several processes the main one alone reports, and it shares what is asked of it
    asked, others = current_control(), None if accelerator.is_main_process else silent
    with reporting(others, Control() if accelerator.num_processes > 1 else None):
        try:
            return _train(recipe, folder, base, accelerator, asked, allow_changes=allow_changes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(folder) from None  # whoever catches it can say what to resume
        except StoppedError as error:
            has_begun = (folder / "checkpoints").exists()
            then = f"go on with: diffgraft train --resume {folder}" if has_begun else "nothing was trained."
            raise StoppedError(f"{error} To continue: {then}" if has_begun else f"{error} So far {then}") from error
        except DiskFullError as error:
            has_begun = (folder / "recipe.yaml").exists()
            then = f"go on with: diffgraft train --resume {folder}" if has_begun else "start again."
            raise DiskFullError(f"{error} Then {then}") from error


def _train(
    recipe: Recipe, folder: Path, base: str | Path | Base, accelerator: Any, control: Control, *, allow_changes: bool
) -> Run:
    """Check everything, train what is left to be trained, and draw what was learnt."""
    device = accelerator.device
    check_settings(recipe.model, recipe.adapter, recipe.optim, recipe.objective, recipe.runtime, recipe.outputs, device)
    check_shards(recipe.shard, accelerator)
    recipe, read = read_concepts(recipe)
    check_pictures(read)
    held = _base(recipe.model, recipe.precision, base)
    # so that what is written says it, whoever loaded it
    recipe = recipe.model_copy(update={"quantize": held.quantize})
    check_family(recipe.groups(), held)
    check_base(recipe.data, recipe.objective, held)
    is_done = (folder / "adapter.safetensors").exists()  # which can do without the file it began with
    needs_start = recipe.init_from and not (is_done and not Path(recipe.init_from).exists())
    start = read_init_adapter(recipe.init_from, held) if needs_start else None
    was_on = held.device
    held.to(accelerator.device)
    try:
        if not held.family.blocks:  # it is no UNet, on which the format was tried
            check_format(recipe.format, recipe.adapter, held)
        live = attach(recipe, held, start)  # what cannot be is refused before anything is drawn or written
        try:
            check_frozen(recipe.shard, held, live)
        finally:
            live.detach()
        with exclusive_lock(folder) if accelerator.is_main_process else nullcontext():
            trained = {name: value for name, value in live.trainable().items() if value.requires_grad}
            begun_with = init_hash(recipe.init_from, start)
            fingerprint = run_fingerprint(recipe, held.hash, "", begun_with, accelerator.num_processes)
            done = check_same(folder, fingerprint, trained, allow_changes=allow_changes)
            if done > recipe.steps:
                raise DiffgraftError(f"{folder} has done {done} steps already, which is past steps={recipe.steps}.")
            run = finished_run(folder, recipe, done, allow_changes=allow_changes)
            if accelerator.is_main_process:
                remove_partials(folder)
            if run is None:
                if accelerator.is_main_process and not done:  # a run that goes on keeps its recipe until all is checked
                    save_recipe(recipe, folder / "recipe.yaml")
                setup = Setup(held, folder, accelerator, read, start, control, allow_changes)
                run = AdapterTraining(recipe, setup).run()
            if accelerator.is_main_process and not run.before_after.exists():
                save_loss_plot(curves(run.metrics), folder / "loss.png")
                if recipe.previews:
                    side = resolution_of(recipe.data, held)
                    with warn_of_overflow("There is no before-after.png."):
                        sheet = before_after(recipe.samples(), side, held, run.adapter, _shown(read))
                        emit(Artifact("samples", save_image(sheet, run.before_after), run.steps))
            accelerator.wait_for_everyone()
    finally:
        held.to(was_on)
    return run


def _shown(read: ConceptImages) -> list[Image.Image]:
    """A few of the pictures that are learnt, of each concept some."""
    each = max(1, _MOST_SHOWN // len(read))
    return [picture.image for _, pictures in read for picture in pictures[:each]][:_MOST_SHOWN]


def _base(model: ModelSettings, precision: str, base: str | Path | Base) -> Base:
    """The base that was given, or the recipe's.

    Raises:
        DiffgraftError: the one that was given was loaded otherwise than the recipe says.
    """
    if not isinstance(base, Base):
        with phase(f"loading {model.base}"):
            return load_base(model.base, DTYPES[precision], **model.load_options())
    if apart := base.differences(model.load_options()):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has {', '.join(apart)}. Load the base with "
            f"load_base(…, {', '.join(apart)})."
        )
    return base
