"""Candidates: the adapters that are compared, such as those that a run saved on its way."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.errors import DiffgraftError
from diffgraft.generation.adapter_library import usual_name
from diffgraft.trainers.hooks.checkpoint import checkpoints
from diffgraft.trainers.run.adapter_file import read_adapter_file
from diffgraft.trainers.run.checkpoint_adapter import checkpoint_adapter, checkpoint_hash

_STEP = re.compile(r"step-(\d{6,12})")
FINAL = "adapter.safetensors"


@dataclass(frozen=True, eq=False)
class Candidate:
    """An adapter that is evaluated."""

    name: str
    """Name for tables: ``step 200``, ``final``, or the file's name"""
    path: Path
    adapter: Adapter
    hash: str
    """SHA-256 of its file, or of the parameters in its checkpoint"""
    step: int | None = None
    """Step of the run that saved it; None if it is not known"""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the file's header."""
        return self.adapter.metadata


def run_folder_or_none(source: str | Path) -> Path | None:
    """Return the folder of a run that `source` is, or None if it is something else."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() and (folder / "recipe.yaml").is_file() else None


def adapter_paths(source: str | Path) -> list[tuple[str, int | None, Path]]:
    """Return name, step and path of the adapters of a run, oldest first, or of a file.

    Of a run these are the adapters in its folder `adapters/` (recipe key `adapter_every`), those in its checkpoints at
    other steps, the one with the lowest held-out loss, and the final one.

    Raises:
        DiffgraftError: the run has no adapter, or there is nothing at `source`.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise DiffgraftError(f"There is no run and no adapter at {source}: give the folder of a run, or adapter files.")
    folder = run_folder_or_none(path)
    if folder is None:
        return [(usual_name(str(path)), None, path)]
    by_step = {_step_of(file): file for file in (*checkpoints(folder), *(folder / "adapters").glob("step-*"))}
    is_finished = (folder / FINAL).is_file()
    last = max((step for step in map(_step_of, checkpoints(folder)) if step is not None), default=None)
    found: list[tuple[str, int | None, Path]] = [
        (f"step {step}", step, file)
        for step, file in sorted((step, file) for step, file in by_step.items() if step is not None)
        if not (is_finished and step == last and file.parent.name == "checkpoints")  # it is the final adapter
    ]
    others = (("best", None, folder / "best.safetensors"), ("final", last if is_finished else None, folder / FINAL))
    found += [(name, step, file) for name, step, file in others if file.is_file()]
    if not found:
        raise DiffgraftError(
            f"The run in {folder} has saved no adapter yet: wait for its first checkpoint, or set adapter_every=100 to "
            "save an adapter every 100 steps."
        )
    return found


def _step_of(path: Path) -> int | None:
    """Return the step in a name such as ``step-000200.safetensors``; None for other names."""
    match = _STEP.fullmatch(path.stem)
    return int(match[1]) if match else None


def read_candidates(sources: Sequence[str | Path], base: Base) -> list[Candidate]:
    """Load all adapters of runs and files; those with the same content are one candidate, under the last name.

    Raises:
        DiffgraftError: a file is not an adapter of this base, or there is none.
    """
    listed = [(Path(source), *item) for source in sources for item in adapter_paths(source)]
    counts = Counter(name for _, name, _, _ in listed)
    by_hash: dict[str, Candidate] = {}
    for source, name, step, path in listed:
        adapter, digest = _read(path, base)
        title = name if counts[name] == 1 else f"{_place(source)} {name}"
        earlier = by_hash.pop(digest, None)
        if step is None and earlier is not None:
            step = earlier.step
        by_hash[digest] = Candidate(title, path, adapter, digest, step)
    return list(by_hash.values())


def _read(path: Path, base: Base) -> tuple[Adapter, str]:
    """Return the adapter of a file or of a checkpoint, and its hash."""
    if path.parent.name == "checkpoints" and (path / "state.json").is_file():
        return checkpoint_adapter(path, base), checkpoint_hash(path)
    file = read_adapter_file(str(path), base)
    return file.adapter, file.hash


def _place(source: Path) -> str:
    """Return what tells adapters of one name apart: the folder of a run, or the folders of a file."""
    if source.is_dir():
        return source.absolute().name
    parents = [folder.name for folder in source.absolute().parents if folder.name != "adapters"]
    return parents[0] if parents else ""
