"""Metrics of a run's steps, stored in its ``metrics.jsonl``, one JSON object a line."""

import errno
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from diffgraft.disk import full_disk_errors
from diffgraft.files import fsync, write_text
from diffgraft.progress import Step, emit

Entry = dict[str, float]
"""`step` with its `lr`, `effective_lr` (Prodigy only), `loss` and the objective's terms; or `step` with a value that
was measured after it, such as `validation`"""


class Metrics:
    """The metrics of a run, in memory and in its file."""

    def __init__(self, folder: Path, steps: int, done: int, *, writes: bool) -> None:
        """Read the entries of the first `done` of `steps` steps in a run's folder; only the main process `writes`."""
        self.entries = [entry for entry in read_metrics(folder) if entry["step"] <= done]
        self.listeners: list[Callable[[Entry], None]] = []
        """Callbacks that receive each announced entry"""
        self._file, self._steps, self._writes = folder / "metrics.jsonl", steps, writes

    def begin(self) -> None:
        """Rewrite the file with the entries that were read, which drops those of later steps."""
        if self._writes:
            write_text(self._file, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, entry: Entry) -> None:
        """Append an entry to memory and file; if the disk is full, nothing of its line is written.

        Raises:
            DiskFullError: the disk is full.
        """
        if self._writes:
            self._append((json.dumps(entry) + "\n").encode())
        self.entries.append(entry)

    def announce(self, entry: Entry) -> None:
        """Pass an added entry to the reporter and the listeners."""
        values = {name: value for name, value in entry.items() if name != "step"}
        emit(Step(int(entry["step"]), self._steps, values))
        if self._writes:
            for listener in self.listeners:
                listener(entry)

    def _append(self, line: bytes) -> None:
        with full_disk_errors(self._file), self._file.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, "incomplete line")

    def fsync(self) -> None:
        """Flush the file to disk, so that no checkpoint survives a crash that its metrics do not."""
        fsync(self._file)


def read_metrics(folder: Path) -> list[Entry]:
    """Entries of a run's ``metrics.jsonl``; empty without such a file. Damaged lines are skipped with a warning."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    entries = [entry for line in lines if (entry := _parse(line)) is not None]
    # a killed process may leave an incomplete last line
    if damaged := len(lines) - len(entries) - (bool(lines) and _parse(lines[-1]) is None):
        warnings.warn(f"{damaged} of the {len(lines)} lines of {path} are damaged and were skipped.", stacklevel=2)
    return entries


def _parse(line: str) -> Entry | None:
    """Entry in a line of JSON, or None if the line is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    are_numbers = isinstance(entry, dict) and all(type(value) in (int, float) for value in entry.values())
    return entry if are_numbers and "step" in entry else None


def by_step(entries: Sequence[Entry]) -> list[Entry]:
    """Merge the entries of each step into one, so that a step's validation loss is beside its training loss."""
    steps: dict[float, Entry] = {}
    for entry in entries:
        steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def loss_curves(entries: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Loss curves of a run: name of a loss → step → value."""
    names = dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "lr", "effective_lr"))
    return {name: {int(entry["step"]): entry[name] for entry in entries if name in entry} for name in names}
