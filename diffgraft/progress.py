"""Progress of everything that lasts, as events; one reporter at a time shows them, and a control asks for more.

Work says what it does by `phase`, `track`, `step` and `artifact`, and whoever started it chooses who listens::

    control = Control()
    with reporting(print, control):
        dg.train("subject", images="my_dog/", subject="dog")   # elsewhere: control.stop()

Without `reporting`, bars are drawn in a terminal, and lines are written elsewhere (`default_reporter`). Reporter and
control belong to the thread that set them, so that several runs in one process keep theirs.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from diffgraft.errors import DiffgraftError
from diffgraft.terminal import printable

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """A stretch of work begins, perhaps inside another one."""

    name: str
    """What is done, such as "encoding pictures" """
    total: int | None = None
    """Units of work in it, where that is known"""
    done: int = 0
    """Units that were done before, in an earlier part of the run"""


@dataclass(frozen=True)
class Advance:
    """Some of the newest phase that has not ended is done."""

    name: str
    done: int
    total: int | None
    remaining: float | None = None
    """Seconds left of it, where they are estimated"""
    values: Mapping[str, float] = field(default_factory=dict)
    """What to show beside it, such as the loss"""


@dataclass(frozen=True)
class Step:
    """A training step was recorded."""

    step: int
    total: int
    values: Mapping[str, float]
    """What was recorded of it: lr, loss and its terms, or the validation after it"""


@dataclass(frozen=True)
class Artifact:
    """A file was written that people look at or use."""

    kind: str
    """`checkpoint`, `samples`, `adapter`, `best` or `plot`"""
    path: Path
    step: int | None = None


@dataclass(frozen=True)
class Note:
    """Something a person should read."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Done:
    """A phase has ended, whether it came to its end or not."""

    name: str
    seconds: float


Event = Phase | Advance | Step | Artifact | Note | Done
Reporter = Callable[[Event], None]


class StoppedError(DiffgraftError):
    """What lasted was stopped through its `Control`; a run that had begun has a checkpoint."""


class Control:
    """What another thread may ask of work that lasts; it is heeded after the step or unit that is being done."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._asked: set[str] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ask for the end: training writes a checkpoint first."""
        self._stop.set()

    def sample_now(self) -> None:
        """Ask a run for samples after its current step."""
        self._ask("sample")

    def save_now(self) -> None:
        """Ask a run for a checkpoint after its current step."""
        self._ask("save")

    @property
    def is_stopping(self) -> bool:
        """Whether the end was asked for."""
        return self._stop.is_set()

    def pop_request(self, what: str) -> bool:
        """Whether `sample` or `save` was asked for since the last call, which answers the request."""
        with self._lock:
            was_asked = what in self._asked
            self._asked.discard(what)
            return was_asked

    def _ask(self, what: str) -> None:
        with self._lock:
            self._asked.add(what)


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)
_control: ContextVar[Control | None] = ContextVar("control", default=None)


@contextmanager
def reporting(reporter: Reporter | None = None, control: Control | None = None) -> Iterator[None]:
    """Within the block events go to `reporter`, and `control` is heeded; what is None stays as it was outside."""
    tokens = [(_reporter, _reporter.set(reporter))] if reporter is not None else []
    controls = [(_control, _control.set(control))] if control is not None else []
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)
        for other, held in controls:
            other.reset(held)


def control() -> Control:
    """The control of the current work; one that nobody holds where none was given."""
    return _control.get() or Control()


def silent(_: Event) -> None:
    """Show nothing: the reporter of library calls that ask for none."""


def emit(event: Event) -> None:
    """Send an event to the reporter."""
    reporter = _reporter.get()
    if reporter is None:
        reporter = default_reporter()
        _reporter.set(reporter)
    reporter(event)


class Tracker:
    """Counts what is done of a phase."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        self.name, self.total, self.done = name, total, done

    def advance(
        self, count: int = 1, remaining: float | None = None, values: Mapping[str, float] | None = None
    ) -> None:
        """Say that `count` more units are done.

        Raises:
            StoppedError: a stop was asked for.
        """
        self.done += count
        emit(Advance(self.name, self.done, self.total, remaining, values or {}))
        check_stop()


@contextmanager
def phase(name: str, total: int | None = None, done: int = 0) -> Iterator[Tracker]:
    """A stretch of work; the block is given what counts it."""
    begun = time.monotonic()
    emit(Phase(name, total, done))
    try:
        yield Tracker(name, total, done)
    finally:
        emit(Done(name, time.monotonic() - begun))


def track(items: Collection[T], name: str, min_items: int = 0) -> Iterator[T]:
    """The items, one after the other, as a phase; of fewer than `min_items` nothing is said.

    Raises:
        StoppedError: a stop was asked for.
    """
    if len(items) < min_items:
        yield from items
        return
    with phase(name, len(items)) as tracker:
        for item in items:
            yield item
            tracker.advance()


def check_stop() -> None:
    """Raise StoppedError where a stop was asked for."""
    if (asked := _control.get()) is not None and asked.is_stopping:
        raise StoppedError("Stopped, as was asked for.")


class Bars:
    """Bars in a terminal, one for each phase that has not ended."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bars: list[Any] = []

    def __call__(self, event: Event) -> None:
        from tqdm import tqdm

        match event:
            case Phase(name, total, done):
                shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]" if total else None
                bar = tqdm(
                    total=total, initial=done, desc=printable(name), leave=False, file=self._stream, bar_format=shown
                )
                self._bars.append(bar)
            case Advance(_, done, _, remaining, values) if self._bars:
                bar = self._bars[-1]
                if values:
                    bar.set_postfix(values, refresh=False)
                if remaining is not None:
                    left = _clock(remaining)
                    bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<" + left + "{postfix}]"
                bar.update(done - bar.n)
            case Done() if self._bars:
                self._bars.pop().close()
            case Note(text):
                tqdm.write(printable(text), file=self._stream or sys.stderr)


class Lines:
    """Plain lines for logs: at most one every `every` seconds for each phase, and one for each file or note."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._stream, self._every = stream, every
        self._next: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Phase(name):
                self._next[name] = time.monotonic() + self._every
            case Advance(name, done, total, remaining, values):
                now = time.monotonic()
                if now >= self._next.get(name, now + 1):
                    self._next[name] = now + self._every
                    told = [f"{name}: {done}" + (f"/{total}" if total else "")]
                    told += [f"{key} {value:.4g}" for key, value in values.items()]
                    told += [f"{_clock(remaining)} left"] if remaining is not None else []
                    self._write(", ".join(told))
            case Artifact(kind, path):
                self._write(f"{kind}: {path}")
            case Note(text, is_warning):
                self._write(f"warning: {text}" if is_warning else text)

    def _write(self, line: str) -> None:
        print(printable(line), file=self._stream or sys.stderr, flush=True)


class JsonLines:
    """One JSON object a line and event, for programs: its type under ``event``, its fields beside that."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        import json
        import math

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {str(key): plain(one) for key, one in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        fields = {key: plain(value) for key, value in asdict(event).items()}
        line = json.dumps({"event": type(event).__name__.lower(), **fields}, default=str)
        print(line, file=self._stream or sys.stderr, flush=True)


REPORTERS: dict[str, Callable[[], Reporter]] = {
    "auto": lambda: default_reporter(),
    "bars": Bars,
    "lines": Lines,
    "json": JsonLines,
    "none": lambda: silent,
}
"""What ``--progress`` takes → the reporter"""


def default_reporter() -> Reporter:
    """Bars where the error output is a terminal and ``TQDM_DISABLE`` is not set, and lines elsewhere."""
    is_disabled = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return Bars() if sys.stderr.isatty() and not is_disabled else Lines()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
