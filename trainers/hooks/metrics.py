"""What a run records of its steps, in its ``metrics.jsonl``: lines of JSON."""

import errno
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from diffgraft.disk import full_disk_errors
from diffgraft.files import fsync, write_text
from diffgraft.progress import Step, emit

Entry = dict[str, float]
"""`step`, and either its `lr` (and the `effective_lr` that Prodigy makes of it), `loss` and the objective's terms, or
what was found after it, such as `validation`"""


class Metrics:
    """The entries of a run, in memory and in its file."""

    def __init__(self, folder: Path, steps: int, done: int, *, writes: bool) -> None:
        """Take up what stands there of the first `done` of `steps`; of several processes one `writes`."""
        self.entries = [entry for entry in read_metrics(folder) if entry["step"] <= done]
        self.listeners: list[Callable[[Entry], None]] = []
        """Called with each entry that is announced"""
        self._file, self._steps, self._writes = folder / "metrics.jsonl", steps, writes

    def begin(self) -> None:
        """Leave in the file what was taken up, and nothing of later steps."""
        if self._writes:
            write_text(self._file, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, entry: Entry) -> None:
        """Append an entry: the whole line or, where the disk is full, nothing of it.

        Raises:
            DiskFullError: there is no room for it.
        """
        if self._writes:
            self._append((json.dumps(entry) + "\n").encode())
        self.entries.append(entry)

    def announce(self, entry: Entry) -> None:
        """Tell the reporter and the listeners of an entry that was added."""
        values = {name: value for name, value in entry.items() if name != "step"}
        emit(Step(int(entry["step"]), self._steps, values))
        if self._writes:
            for listener in self.listeners:
                listener(entry)

    def _append(self, line: bytes) -> None:
        with full_disk_errors(self._file), self._file.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):
                file.truncate(before)
                raise OSError(errno.ENOSPC, "half a line")

    def fsync(self) -> None:
        """Wait until all of it is there: a checkpoint must not outlive what it has recorded."""
        fsync(self._file)


def read_metrics(folder: Path) -> list[Entry]:
    """The whole lines of a run's file; none where there is no such file yet. Damaged lines are told of and left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    found = [entry for line in lines if (entry := _entry(line)) is not None]
    # the end of the file may be half a line, where a process was killed
    if lacking := len(lines) - len(found) - (bool(lines) and _entry(lines[-1]) is None):
        warnings.warn(f"{lacking} of the {len(lines)} lines of {path} are damaged and left out.", stacklevel=2)
    return found


def _entry(line: str) -> Entry | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    are_numbers = isinstance(found, dict) and all(type(value) in (int, float) for value in found.values())
    return found if are_numbers and "step" in found else None


def by_step(entries: Sequence[Entry]) -> list[Entry]:
    """One entry a step: with it, what was found out after it."""
    steps: dict[float, Entry] = {}
    for entry in entries:
        steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def curves(entries: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Every loss in the entries of a run, with the steps it is of."""
    names = dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "lr", "effective_lr"))
    return {name: {int(entry["step"]): entry[name] for entry in entries if name in entry} for name in names}
