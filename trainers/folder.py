"""The folder of a run: a new one, one to go on with, one that is finished."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.header import told
from diffgraft.errors import DiffgraftError
from diffgraft.trainers.materials import local
from diffgraft.trainers.recipe import Recipe
from diffgraft.trainers.recipe_files import load_recipe
from diffgraft.trainers.record import by_step, read_record
from diffgraft.trainers.settings import Concept, Validation


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    metrics: Sequence[dict[str, float]]
    """One entry a step: step, lr, loss and the objective's terms"""
    was_finished: bool = False
    """Whether nothing was left to be trained"""

    @property
    def steps(self) -> int:
        """How many were trained, in all."""
        return int(max((entry["step"] for entry in self.metrics), default=0))

    @property
    def adapter_file(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def before_after(self) -> Path:
        """A grid of the same prompts and seeds without and with the adapter."""
        return self.folder / "before-after.png"

    @property
    def adapter(self) -> Adapter:
        """What was learnt, read from its file."""
        return load_adapter(self.adapter_file)


def recipe_with(recipe: str | Path, settings: dict[str, Any]) -> Recipe:
    """A recipe with settings laid over it, as `train` takes both.

    Raises:
        DiffgraftError: as `load_recipe`, and where it names no pictures, or some that would be ignored.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    plan = load_recipe(recipe, {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()})
    if not plan.images and not plan.concepts:
        raise DiffgraftError(f"The recipe {recipe} needs pictures: add images=FOLDER (JPEG, PNG or WebP files).")
    if plan.images and plan.concepts and all(one.images for one in plan.concepts):
        raise DiffgraftError(
            f"images={plan.images} would be ignored, as each concept has images of its own: leave it out."
        )
    return plan


def new_run(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    """Recipe and folder of a run that begins; nothing is written yet.

    Raises:
        DiffgraftError: as `recipe_with`, and where there is a run in the folder already.
    """
    plan = recipe_with(recipe, settings)
    folder = Path(plan.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    if (folder / "adapter.safetensors").exists():
        raise DiffgraftError(
            f"{folder} already holds a finished run. Choose another output=…, or remove it to train again."
        )
    # what was refused, or killed, before there are any of these has nothing to go on with
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Go on with it: --resume {folder}, or choose another output=…"
        )
    return _placed(plan, folder), folder


def earlier_run(folder: Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    """Recipe and folder of a run that goes on, with settings laid over what stands there.

    Raises:
        DiffgraftError: there is no run, or it is to go on elsewhere.
    """
    path = folder / "recipe.yaml"
    if folder.is_file():
        raise DiffgraftError(f"{folder} is a file; --resume takes the folder of a run.")
    if not path.is_file():
        raise DiffgraftError(
            f"There is no run to resume in {folder}: it holds no recipe.yaml. Give the folder of a run."
        )
    if "output" in settings:
        raise DiffgraftError(f"A run goes on where it is, in {folder}: leave output=… out.")
    return _placed(recipe_with(path, settings), folder), folder


def finished(folder: Path, plan: Recipe, done: int, *, changed: bool) -> Run | None:
    """The run in a folder, where it has come to the end of the recipe; one that is to have more steps has not.

    Raises:
        DiffgraftError: it has, and what is `changed` comes too late; or nothing is left to go on from.
    """
    run = Run(folder, plan, by_step(read_record(folder)), was_finished=True)
    if not run.adapter_file.exists():
        return None
    try:
        with safe_open(run.adapter_file, "pt") as file:
            said = told(file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError, ValueError) as error:
        raise DiffgraftError(
            f"{run.adapter_file} is damaged ({error}): remove it, and the run goes on from its last checkpoint."
        ) from error
    if not isinstance(said, dict) or type(said.get("steps", 0)) is not int:
        raise DiffgraftError(
            f"{run.adapter_file} was not written by this run, as its header has no recipe: move it away, and the "
            "run goes on from its last checkpoint."
        )
    steps = said.get("steps", type(plan).model_fields["steps"].default)
    is_finished = f"{folder} is finished after {steps} steps"
    if steps == plan.steps and changed:
        raise DiffgraftError(f"{is_finished}: nothing is left to be changed. Give more steps=…")
    if steps != plan.steps and not done:
        raise DiffgraftError(f"{is_finished}, and has no checkpoint to go on from.")
    return run if steps == plan.steps else None


def _placed(plan: Recipe, folder: Path) -> Recipe:
    """The recipe with whole paths, which hold wherever it is read again."""
    found = plan.model_copy(deep=True)
    found.init_from = local(plan.init_from) if plan.init_from else ""
    found.output, found.base = str(folder), plan.base if plan.base == "tiny" else local(plan.base)
    held: list[Recipe | Concept | Validation] = [found, *found.concepts, found.validation]
    for part in held:
        part.images = local(part.images) if part.images else ""
    for one in (found, *found.concepts):
        if (prior := getattr(one, "prior", None)) is not None and prior.folder:
            prior.folder = local(prior.folder)
    return found
