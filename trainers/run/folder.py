"""The folder of a run: a new one, one to go on with, one that is finished."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.formats import load_adapter
from diffgraft.adapters.formats.header import read_metadata
from diffgraft.data.inventory import NUMBERED
from diffgraft.errors import DiffgraftError
from diffgraft.files import PARTIAL
from diffgraft.trainers.hooks.metrics import by_step, read_metrics
from diffgraft.trainers.recipe.files import is_saved, load_recipe
from diffgraft.trainers.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run; as a path it is that of its adapter."""

    folder: Path
    recipe: Recipe
    metrics: Sequence[dict[str, float]]
    """One entry a step: step, lr, loss and the objective's terms"""
    was_finished: bool = False
    """Whether nothing was left to be trained"""

    def __fspath__(self) -> str:
        return str(self.adapter_file)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.recipe.task} by {self.recipe.method}, {self.steps} steps)"

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
    if (prompts := prompts_of(plan.sample_prompts)) is not plan.sample_prompts:
        plan = plan.model_copy(update={"sample_prompts": prompts})
    if not plan.images and not plan.concepts:
        raise DiffgraftError(f"The recipe {recipe} needs pictures: add images=FOLDER (JPEG, PNG or WebP files).")
    if plan.images and plan.concepts and all(one.images for one in plan.concepts):
        raise DiffgraftError(
            f"images={plan.images} would be ignored, as each concept has images of its own: leave it out."
        )
    return plan


def check_output(output: str, folders: Sequence[str]) -> None:
    """Refuse a folder for a new run in which a person's own files lie, or pictures that are learnt from.

    Raises:
        DiffgraftError: `output` is such a folder, or there is a run in it already.
    """
    if not output:
        return
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise DiffgraftError(f"output={folder} is a file: give the name of a folder that is not there yet.")
    read = [Path(one).expanduser() for one in folders_read(folders)]
    if any(one.is_dir() and _same(one, folder) for one in read):
        raise DiffgraftError(
            f"output={folder} is a folder of pictures that are read, and the next run would learn from what this one "
            "draws: choose another output=…"
        )
    if (folder / "adapter.safetensors").exists() and (folder / "recipe.yaml").exists():
        raise DiffgraftError(
            f"{folder} already holds a finished run. Choose another output=…, or remove it to train again."
        )
    # what was refused, or killed, before there are any of these has nothing to go on with
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Go on with it: --resume {folder}, or choose another output=…"
        )
    if own := _files_of_others(folder):
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise DiffgraftError(
            f"output={folder} holds files that are of no run ({own[0]}{more}), and a run might replace them: choose "
            "another output=…, a folder that is empty or not there yet."
        )


def folders_read(folders: Sequence[str]) -> list[str]:
    """All `folders` with pictures, numbered ones in kohya's layout as well."""
    named = [Path(one).expanduser() for one in folders]
    inside = [path for one in named if one.is_dir() for path in (*one.iterdir(), *(one / "img").glob("*"))]
    return [*map(str, named), *(str(path) for path in inside if NUMBERED.fullmatch(path.name))]


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _files_of_others(folder: Path) -> list[str]:
    """What lies in a folder, but for what a run leaves that was refused or killed before its first step."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    is_ours = (folder / "recipe.yaml").is_file() and is_saved(folder / "recipe.yaml")
    ours = {".lock", *(("recipe.yaml", "logs", "samples", "adapters") if is_ours else ())}
    has_begun = is_ours or ".lock" in names
    return [name for name in names if name not in ours and not (has_begun and name.startswith(PARTIAL))]


def prompts_of(given: list[str]) -> list[str]:
    """Prompts as they are given, or, of a single name that ends in ``.txt``, the lines of that file.

    Raises:
        DiffgraftError: there is no such file, or it holds none.
    """
    if len(given) != 1 or not given[0].strip().endswith(".txt"):
        return given
    path = Path(given[0].strip()).expanduser()
    if not path.is_file():
        raise DiffgraftError(f"sample_prompts={given[0]} names a file that is not there.")
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{path} is no text in UTF-8: save it again as UTF-8.") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DiffgraftError(f"{path} holds no prompts: write one on each line.")
    return prompts


def new_run(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    """Recipe and folder of a run that begins; nothing is written yet.

    Raises:
        DiffgraftError: as `recipe_with` and `check_output`.
    """
    plan = recipe_with(recipe, settings)
    check_output(plan.output, plan.folders())
    folder = Path(plan.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    return plan.with_absolute_paths(folder), folder


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
        raise DiffgraftError(f"output cannot be changed when resuming; the run continues in {folder}.")
    return recipe_with(path, settings).with_absolute_paths(folder), folder


def finished(folder: Path, plan: Recipe, done: int, *, allow_changes: bool) -> Run | None:
    """The run in a folder, where it has come to the end of the recipe; one that is to have more steps has not.

    Raises:
        DiffgraftError: it has, and `allow_changes` comes too late; or nothing is left to go on from.
    """
    run = Run(folder, plan, by_step(read_metrics(folder)), was_finished=True)
    if not run.adapter_file.exists():
        return None
    try:
        with safe_open(run.adapter_file, "pt") as file:
            said = read_metadata(file.metadata() or {}).get("recipe")
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
    if steps == plan.steps and allow_changes:
        raise DiffgraftError(f"The run {folder} finished at step {steps}. Pass a larger steps= to continue.")
    if steps != plan.steps and not done:
        raise DiffgraftError(f"{is_finished}, and has no checkpoint to go on from.")
    before = recipe_with(folder / "recipe.yaml", {}).with_absolute_paths(folder)
    old, new = ([part.images for part in one.parts()] for one in (before, plan))
    if steps == plan.steps and old != new:
        raise DiffgraftError(
            f"{is_finished} on images={', '.join(old)}: images={', '.join(new)} would not be learned. Leave it out, or "
            "pass a larger steps= to continue."
        )
    return run if steps == plan.steps else None
