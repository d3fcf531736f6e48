"""The folder of a run: new, to be resumed, or finished."""

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
from diffgraft.trainers.objectives.registry import objectives
from diffgraft.trainers.recipe.files import is_saved, load_recipe
from diffgraft.trainers.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run. It can be used as a path: that of its adapter file."""

    folder: Path
    recipe: Recipe
    metrics: Sequence[dict[str, float]]
    """One entry for each step: step, lr, loss and the objective's terms"""
    was_finished: bool = False
    """Whether the run was finished already, so that nothing was trained"""

    def __fspath__(self) -> str:
        return str(self.adapter_file)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.recipe.task} by {self.recipe.method}, {self.steps} steps)"

    @property
    def steps(self) -> int:
        """Number of steps trained in all."""
        return int(max((entry["step"] for entry in self.metrics), default=0))

    @property
    def adapter_file(self) -> Path:
        """Path of the trained adapter."""
        return self.folder / "adapter.safetensors"

    @property
    def before_after(self) -> Path:
        """Path of an image grid without and with the adapter, for the same prompts and seeds."""
        return self.folder / "before-after.png"

    @property
    def adapter(self) -> Adapter:
        """The trained adapter, loaded from its file."""
        return load_adapter(self.adapter_file)


def recipe_with(recipe: str | Path, settings: dict[str, Any]) -> Recipe:
    """Load a recipe, override it with `settings`, and read its sample prompts, as `train` does.

    Raises:
        DiffgraftError: as in `load_recipe`; or the recipe has no images, or `images` that would be ignored.
    """
    overrides: dict[str, Any] = {}
    for key, value in settings.items():
        overrides |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    loaded = load_recipe(recipe, overrides)
    if (prompts := read_prompts(loaded.sample_prompts)) is not loaded.sample_prompts:
        loaded = loaded.model_copy(update={"sample_prompts": prompts})
    objective = objectives().get(loaded.loss.objective)
    if not loaded.images and not loaded.concepts and not (objective is not None and objective.draws_pictures):
        raise DiffgraftError(f"The recipe {recipe} has no images: add images=FOLDER (with JPEG, PNG or WebP files).")
    if loaded.images and loaded.concepts and all(concept.images for concept in loaded.concepts):
        raise DiffgraftError(
            f"images={loaded.images} would be ignored, as each concept has images of its own: remove it."
        )
    return loaded


def check_output(output: str, folders: Sequence[str]) -> None:
    """Check that a new run may write to the folder `output`; `folders` are those its images are read from.

    Raises:
        DiffgraftError: `output` is one of the image `folders`, holds a run already, or holds other files.
    """
    if not output:
        return
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise DiffgraftError(f"output={folder} is a file: give a folder that does not exist yet.")
    image_folders = [Path(path).expanduser() for path in folders_read(folders)]
    if any(path.is_dir() and _same(path, folder) for path in image_folders):
        raise DiffgraftError(
            f"output={folder} is also a folder of training images, and the next run would train on the images that "
            "this one generates: choose another output=…"
        )
    if (folder / "adapter.safetensors").exists() and (folder / "recipe.yaml").exists():
        raise DiffgraftError(
            f"{folder} already holds a finished run. Choose another output=…, or remove it to train again."
        )
    # a run that was refused or killed before these exist has nothing to resume
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise DiffgraftError(
            f"{folder} holds an unfinished run. Resume it with --resume {folder}, or choose another output=…"
        )
    if files := _foreign_files(folder):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DiffgraftError(
            f"output={folder} holds files that belong to no run ({files[0]}{more}), and a run might overwrite them: "
            "choose another output=…, a folder that is empty or does not exist yet."
        )


def folders_read(folders: Sequence[str]) -> list[str]:
    """Paths of all folders that images are read from: `folders`, and numbered folders of kohya's layout in them."""
    roots = [Path(folder).expanduser() for folder in folders]
    inside = [path for root in roots if root.is_dir() for path in (*root.iterdir(), *(root / "img").glob("*"))]
    return [*map(str, roots), *(str(path) for path in inside if NUMBERED.fullmatch(path.name))]


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _foreign_files(folder: Path) -> list[str]:
    """Names of files in a folder, except those of a run that was refused or killed before its first step."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    is_run = (folder / "recipe.yaml").is_file() and is_saved(folder / "recipe.yaml")
    run_files = {".lock", "studio", *(("recipe.yaml", "logs", "samples", "adapters") if is_run else ())}
    has_begun = is_run or ".lock" in names
    return [name for name in names if name not in run_files and not (has_begun and name.startswith(PARTIAL))]


def read_prompts(prompts: list[str]) -> list[str]:
    """Return `prompts` unchanged, or the lines of a file if they are a single name that ends in ``.txt``.

    Empty lines and those that begin with ``#`` are skipped.

    Raises:
        DiffgraftError: the file does not exist, is not UTF-8, or has no prompts.
    """
    if len(prompts) != 1 or not prompts[0].strip().endswith(".txt"):
        return prompts
    path = Path(prompts[0].strip()).expanduser()
    if not path.is_file():
        raise DiffgraftError(f"Invalid value sample_prompts={prompts[0]}: there is no such file.")
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DiffgraftError(f"{path} is not UTF-8 text: save it again as UTF-8.") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DiffgraftError(f"{path} has no prompts: write one on each line.")
    return lines


def new_run(recipe: str | Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    """Recipe and folder of a new run; nothing is written yet.

    Raises:
        DiffgraftError: as in `recipe_with` and `check_output`.
    """
    loaded = recipe_with(recipe, settings)
    check_output(loaded.output, loaded.folders())
    folder = Path(loaded.output or f"runs/{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    return loaded.with_absolute_paths(folder), folder


def resumed_run(folder: Path, settings: dict[str, Any]) -> tuple[Recipe, Path]:
    """Recipe and folder of a run to be resumed; `settings` override the recipe saved there.

    Raises:
        DiffgraftError: there is no run in `folder`, or `settings` change its folder.
    """
    path = folder / "recipe.yaml"
    if folder.is_file():
        raise DiffgraftError(f"{folder} is a file, but --resume needs the folder of a run.")
    if not path.is_file():
        raise DiffgraftError(
            f"There is no run to resume in {folder}, as it has no recipe.yaml. Give the folder of a run."
        )
    if "output" in settings:
        raise DiffgraftError(f"output cannot be changed when resuming; the run continues in {folder}. Remove output=…")
    return recipe_with(path, settings).with_absolute_paths(folder), folder


def finished_run(folder: Path, recipe: Recipe, done: int, *, allow_changes: bool) -> Run | None:
    """The run in `folder` if it has trained all steps of `recipe`; None if there are steps left to train.

    Args:
        folder: the run's folder.
        recipe: the recipe, with the settings of this call.
        done: step of the newest checkpoint, 0 without one.
        allow_changes: whether the caller allows settings to differ from those of earlier steps.

    Raises:
        DiffgraftError: it is finished, so that changes would have no effect; or its adapter is damaged; or there are
            steps left, but no checkpoint to continue from.
    """
    run = Run(folder, recipe, by_step(read_metrics(folder)), was_finished=True)
    if not run.adapter_file.exists():
        return None
    try:
        with safe_open(run.adapter_file, "pt") as file:
            trained_recipe = read_metadata(file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError, ValueError) as error:
        raise DiffgraftError(
            f"{run.adapter_file} is damaged ({error}): remove it, and the run continues from its last checkpoint."
        ) from error
    if not isinstance(trained_recipe, dict) or type(trained_recipe.get("steps", 0)) is not int:
        raise DiffgraftError(
            f"{run.adapter_file} was not written by this run, as its header has no recipe: move it away, and the "
            "run continues from its last checkpoint."
        )
    steps = trained_recipe.get("steps", type(recipe).model_fields["steps"].default)
    finished = f"The run in {folder} finished at step {steps}"
    if steps == recipe.steps and allow_changes:
        raise DiffgraftError(f"{finished}. Pass a larger steps= to continue with the changes.")
    if steps != recipe.steps and not done:
        raise DiffgraftError(
            f"{finished} and has no checkpoint, so it cannot be continued: start a new run with another output=…"
        )
    saved_recipe = recipe_with(folder / "recipe.yaml", {}).with_absolute_paths(folder)
    old, new = ([concept.images for concept in side.parts()] for side in (saved_recipe, recipe))
    if steps == recipe.steps and old != new:
        raise DiffgraftError(
            f"{finished}, trained on images={', '.join(old)}: images={', '.join(new)} would not be learned. Remove "
            "it, or pass a larger steps= to continue."
        )
    return run if steps == recipe.steps else None


def adapter_file(source: str | Path) -> Path:
    """Return the path of the adapter of a run, or of an adapter file.

    Raises:
        DiffgraftError: there is none.
    """
    path = Path(source).expanduser()
    file = path / "adapter.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise DiffgraftError(f"There is no adapter at {source}: give the folder of a finished run, or an adapter file.")
    return file
