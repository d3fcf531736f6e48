"""A training run from beginning to end: recipe in, a folder with an adapter and pictures out."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffgraft.bases import Base, load_base
from diffgraft.data.given import with_folders
from diffgraft.errors import DiffgraftError, in_a_sentence
from diffgraft.files import alone_in, sweep
from diffgraft.generation.plots import save_image, save_loss_plot
from diffgraft.room import DiskFullError
from diffgraft.trainers.hooks.checkpoint import check_same
from diffgraft.trainers.hooks.metrics import curves
from diffgraft.trainers.hooks.samples import before_after, told_of_overflow
from diffgraft.trainers.hooks.trackers import check_trackers
from diffgraft.trainers.recipe.files import save_recipe
from diffgraft.trainers.recipe.recipe import Recipe
from diffgraft.trainers.run.attach import attach
from diffgraft.trainers.run.checks import check_attached, check_base, check_pictures, check_settings
from diffgraft.trainers.run.fingerprint import identity_of
from diffgraft.trainers.run.folder import Run, earlier_run, finished, new_run
from diffgraft.trainers.run.init_from import hash_of, read_start
from diffgraft.trainers.run.train_adapter import learn
from diffgraft.trainers.runtime.processes import new_accelerator, the_same_folder
from diffgraft.trainers.runtime.shards import check_frozen, check_shards
from diffgraft.trainers.training_data.concepts import Read, read_concepts

_MOST_SHOWN = 8
"""Pictures that were learnt from, in before-after.png"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@in_a_sentence
def train(
    recipe: str | Path = "subject",
    /,
    *,
    base: str | Path | Base = "",
    resume: str | Path | None = None,
    changed: bool = False,
    **settings: Any,
) -> Run:
    """Train an adapter and leave a folder with everything about it.

    Args:
        recipe: name of a recipe (``diffgraft recipes`` lists them), or the path of a YAML.
        base: a base, or what `load_base` takes; the recipe's own where it is not given. A `Base` keeps the precision
            of its weights, and after training has the very same bits.
        resume: the folder of an earlier run to go on with, under the recipe that stands there.
        changed: with `resume`, that base, pictures or settings that decide what a step does differ on purpose.
        settings: what differs from the recipe, by key; nested keys as ``prior={"weight": 0.5}``. With `resume` they
            become part of the run's recipe. ``images`` may be a list of paths and of PIL's pictures, too.

    Returns:
        The run: ``adapter.safetensors``, ``recipe.yaml``, ``metrics.jsonl``, ``loss.png``, ``before-after.png`` and
        ``checkpoints/`` lie in its folder.

    Raises:
        DiffgraftError: recipe, pictures or base will not do; nothing has been trained then.
    """
    settings = with_folders(settings)
    if resume is not None:
        other = {"base": base} if isinstance(base, str | Path) and str(base) else {}
        plan, folder = earlier_run(Path(resume).expanduser(), {**settings, **other})
    else:
        named = base.name if isinstance(base, Base) else str(base)
        plan, folder = new_run(recipe, {**settings, "base": named} if named else settings)
    is_done = (folder / "adapter.safetensors").exists()  # which can do without the file it began with
    needed = plan.init_from and not (is_done and not Path(plan.init_from).exists())
    check_trackers(plan)
    accelerator = new_accelerator(plan)
    folder = the_same_folder(accelerator, folder)
    check_settings(plan, accelerator.device)
    check_shards(plan, accelerator)
    plan, read = read_concepts(plan)
    check_pictures(read)
    held = _held(plan, base)
    plan = plan.model_copy(update={"quantize": held.quantize})  # so that what is written says it, whoever loaded it
    check_base(plan, held)
    start = read_start(plan.init_from, held) if needed else None
    was_on = held.device
    held.to(accelerator.device)
    try:
        live = attach(plan, held, start)  # what cannot be is refused before anything is drawn or written
        try:
            check_frozen(plan, held, live)
            check_attached(plan, live)
        finally:
            live.detach()
        with alone_in(folder) if accelerator.is_main_process else nullcontext():
            trained = {name: value for name, value in live.trainable().items() if value.requires_grad}
            identity = identity_of(plan, held.hash, "", hash_of(plan, start), accelerator.num_processes)
            done = check_same(folder, identity, trained, changed=changed)
            if done > plan.steps:
                raise DiffgraftError(f"{folder} has done {done} steps already, which is past steps={plan.steps}.")
            run = finished(folder, plan, done, changed=changed)
            if accelerator.is_main_process:
                sweep(folder)
            if run is None:
                if accelerator.is_main_process and not done:  # a run that goes on keeps its recipe until all is checked
                    save_recipe(plan, folder / "recipe.yaml")
                run = learn(plan, held, folder, accelerator, read, start, changed=changed)
            if accelerator.is_main_process and not run.before_after.exists():
                save_loss_plot(curves(run.metrics), folder / "loss.png")
                with told_of_overflow("There is no before-after.png."):
                    save_image(before_after(plan, held, run.adapter, _shown(read)), run.before_after)
            accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(folder) from None  # whoever catches it can say what to resume
    except DiskFullError as error:
        has_begun = (folder / "recipe.yaml").exists()
        then = f"go on with: diffgraft train --resume {folder}" if has_begun else "start again."
        raise DiskFullError(f"{error} Then {then}") from error
    finally:
        held.to(was_on)
    return run


def _shown(read: Read) -> list[Image.Image]:
    """A few of the pictures that are learnt, of each concept some."""
    each = max(1, _MOST_SHOWN // len(read))
    return [picture.image for _, pictures in read for picture in pictures[:each]][:_MOST_SHOWN]


def _held(plan: Recipe, base: str | Path | Base) -> Base:
    """The base that was given, or the recipe's."""
    if not isinstance(base, Base):
        more = {"prediction_type": plan.prediction_type, "zero_snr": plan.zero_snr, "quantize": plan.quantize}
        return load_base(plan.base, DTYPES[plan.precision], **more)  # type: ignore[arg-type]
    if plan.prediction_type not in (None, base.prediction_type) or plan.zero_snr not in (None, base.zero_snr):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has prediction_type={plan.prediction_type} and "
            f"zero_snr={plan.zero_snr}. Load the base with them: load_base(…, prediction_type=…, zero_snr=…)."
        )
    if plan.quantize not in ("none", base.quantize):
        raise DiffgraftError(
            f"The base that was given is {base!r}; the recipe has quantize={plan.quantize}. Load the base with that: "
            f"load_base(…, quantize={plan.quantize!r})."
        )
    return base
