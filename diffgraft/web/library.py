"""The library: runs and adapter files below the library folder, read from their files at each request."""

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from diffgraft.adapters.ops.glance import glance
from diffgraft.errors import DiffgraftError
from diffgraft.files import PARTIAL
from diffgraft.web.files_of_runs import events_file
from diffgraft.web.paths import UnknownPathError, confined
from diffgraft.web.processes import running_process

State = Literal["queued", "running", "finished", "stopped", "failed"]
_SHOWN_KEYS = ("task", "method", "base", "trigger", "subject", "steps")
_MAX_TEXT = 200
_MAX_RECIPE = 2**20
_TAIL = 2**16
"""Bytes at the end of a file in which its last lines are looked for"""
_RECENT = 120.0
"""Seconds since the last step within which a run that another program started counts as running"""
_MAX_POINTS = 600
"""Steps of a loss curve that are sent"""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunSummary:
    """What the list of runs shows of one."""

    name: str
    state: State
    recipe: Mapping[str, str]
    """Some keys of its recipe, as text"""
    step: int
    """Steps done"""
    preview: str | None
    """Newest picture, relative to the folder of the run"""
    message: str
    """Error with which its last training ended"""
    changed: float
    """Time of its last change, in seconds since 1970"""
    has_adapter: bool
    can_resume: bool


@dataclass(frozen=True)
class AdapterSummary:
    """What the list of adapters shows of one."""

    path: str
    """Path relative to the library folder"""
    bytes: int
    lines: tuple[str, ...]
    """Report of `diffgraft inspect` from the header; empty if the tensors would have to be read"""


def run_folders(root: Path) -> list[Path]:
    """Return the folders of runs, the newest first."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
    runs = [path for path in found if is_run(path) and path.resolve().is_relative_to(root.resolve())]
    return sorted(runs, key=_changed, reverse=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of a training that was refused."""
    return (folder / "recipe.yaml").is_file() or events_file(folder).parent.is_dir()


def find_run(root: Path, name: str) -> Path:
    """Return the folder of the run `name`.

    Raises:
        UnknownPathError: there is none.
    """
    if "/" not in name and "\\" not in name and not name.startswith("."):
        folder = confined(root, name)
        if folder.is_dir() and is_run(folder):
            return root / name
    raise UnknownPathError(f"There is no run {name[:100]!r} in the library.")


def is_running(folder: Path) -> bool:
    """Whether a process trains in the folder of a run."""
    if running_process(folder) is not None:
        return True
    metrics = folder / "metrics.jsonl"
    if events_file(folder).is_file() or (folder / "adapter.safetensors").is_file() or not metrics.is_file():
        return False
    return time.time() - metrics.stat().st_mtime < _RECENT


def summarize(folder: Path, waiting: Collection[str] = ()) -> RunSummary:
    """Return the summary of the run in `folder`; the runs called `waiting` are in the queue."""
    values = read_recipe(folder)
    recipe = {key: str(values.get(key, ""))[:_MAX_TEXT] for key in _SHOWN_KEYS}
    has_adapter = (folder / "adapter.safetensors").is_file()
    has_steps = (folder / "metrics.jsonl").is_file()
    state: State
    if is_running(folder):
        state = "running"
    elif folder.name in waiting:
        state = "queued"
    elif has_adapter:
        state = "finished"
    else:
        state = "stopped" if has_steps else "failed"
    last = next((entry for line in reversed(_last_lines(folder / "metrics.jsonl")) if (entry := _entry(line))), {})
    return RunSummary(
        folder.name,
        state,
        recipe,
        int(last.get("step", 0)),
        _preview(folder),
        "" if state in ("running", "queued") else _last_error(folder),
        _changed(folder),
        has_adapter,
        state in ("stopped", "finished") and (folder / "recipe.yaml").is_file(),
    )


def read_recipe(folder: Path) -> Mapping[str, Any]:
    """Return the keys of a run's recipe; empty if it cannot be read."""
    try:
        info = (folder / "recipe.yaml").stat()
        return _recipe(folder / "recipe.yaml", info.st_mtime_ns, info.st_size)
    except OSError:
        return {}


@lru_cache(512)
def _recipe(path: Path, _: int, size: int) -> Mapping[str, Any]:
    if size > _MAX_RECIPE:
        return {}
    try:
        values = yaml.load(path.read_bytes(), Loader=_Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def loss_points(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of a run's steps, one entry a step, thinned out evenly if they are many."""
    steps: dict[int, dict[str, float]] = {}
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            for line in file:
                if entry := _entry(line):
                    steps.setdefault(int(entry["step"]), {}).update(entry)
    except OSError:
        return []
    entries = [steps[step] for step in sorted(steps)]
    every = math.ceil(len(entries) / _MAX_POINTS) or 1
    last = len(entries) - 1
    return [e for place, e in enumerate(entries) if place % every == 0 or place == last or "validation" in e]


def pictures_of(folder: Path) -> list[str]:
    """Return the pictures of a run: before/after first, then samples from the newest to the oldest."""
    samples = [path for path in (folder / "samples").glob("*") if path.suffix.lower() in _PICTURES]
    samples = [path for path in samples if not path.name.startswith(PARTIAL)]
    top = [folder / "before-after.png"] if (folder / "before-after.png").is_file() else []
    return [path.relative_to(folder).as_posix() for path in (*top, *sorted(samples, key=_changed, reverse=True))]


def checkpoints_of(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints and of the adapters that it saved on the way."""
    found = [*(folder / "checkpoints").glob("*"), *(folder / "adapters").glob("*.safetensors")]
    names = [path.relative_to(folder).as_posix() for path in found if not path.name.startswith((PARTIAL, "."))]
    return sorted(names)


def adapters(root: Path) -> list[AdapterSummary]:
    """Return the adapter files in the library folder and in folders of it, but for checkpoints."""
    return [
        AdapterSummary(path.relative_to(root).as_posix(), path.stat().st_size, report(path)) for path in _files(root)
    ]


def _files(root: Path) -> Iterator[Path]:
    top = root.resolve()
    for pattern in ("*.safetensors", "*/*.safetensors", "*/adapters/*.safetensors"):
        for path in sorted(root.glob(pattern)):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if not hidden and path.is_file() and path.resolve().is_relative_to(top):
                yield path


def report(path: Path) -> tuple[str, ...]:
    """Return the report of an adapter file from its header; empty if the header does not tell enough."""
    info = path.stat()
    return _glance(path, info.st_mtime_ns, info.st_size)


@lru_cache(1024)
def _glance(path: Path, _: int, __: int) -> tuple[str, ...]:
    return tuple(glance(path) or ())


def full_report(path: Path) -> tuple[str, ...]:
    """Return the report of an adapter file, for which its tensors are read.

    Raises:
        DiffgraftError: it cannot be read as an adapter.
    """
    from diffgraft.adapters.formats import load_adapter
    from diffgraft.adapters.ops.inspect import inspect, summary

    return tuple(summary(inspect(load_adapter(path))))


def find_adapter(root: Path, path: str) -> Path:
    """Return the adapter file at `path`, relative to the library folder.

    Raises:
        DiffgraftError: there is none.
    """
    file = confined(root, path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise DiffgraftError(f"{path[:200]!r} is not an adapter file: its name must end in .safetensors.")
    return file


def _preview(folder: Path) -> str | None:
    return next(iter(pictures_of(folder)), None)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_error(folder: Path) -> str:
    """Return the last error that a run's training wrote beside its events."""
    for line in reversed(_last_lines(events_file(folder))):
        text = line.decode("utf-8", "replace").strip()
        if text.startswith("error: "):
            return text.removeprefix("error: ")
        if '"event": "started"' in text:
            break
    return ""


def _last_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read(_TAIL).splitlines()
    except OSError:
        return []


def _entry(line: bytes) -> dict[str, float]:
    """Return the entry in a line of metrics, without values that are no finite numbers; empty for a damaged line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return {}
    return {str(k): v for k, v in entry.items() if type(v) in (int, float) and math.isfinite(v)}
