"""Progress of long operations as events, which a reporter shows, and a control that can stop them.

Long operations send events by `phase`, `track` and `emit`; their caller chooses the reporter::

    control = Control()
    with reporting(print, control):
        dg.train("subject", images="my_dog/", subject="dog")   # in another thread: control.stop()

Without `reporting`, events are shown as progress bars in a terminal, and as lines elsewhere (`default_reporter`).
Reporter and control are set for a thread, so that several runs in one process have their own.
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
    """A phase of work has begun; phases may be nested."""

    name: str
    """Name of the phase, such as "encoding pictures" """
    total: int | None = None
    """Number of units of work in the phase; None if it is not known"""
    done: int = 0
    """Number of units that an earlier part of the run has already done"""


@dataclass(frozen=True)
class Advance:
    """Event: units of work of the innermost open phase are done."""

    name: str
    done: int
    total: int | None
    remaining: float | None = None
    """Estimated seconds until the phase ends; None if there is no estimate"""
    values: Mapping[str, float] = field(default_factory=dict)
    """Values to show with the progress, such as the loss"""


@dataclass(frozen=True)
class Step:
    """The metrics of a training step were recorded."""

    step: int
    total: int
    values: Mapping[str, float]
    """Recorded metrics: learning rate, loss and its terms, or the results of a validation"""


@dataclass(frozen=True)
class Artifact:
    """Event: a file that users are told of was written."""

    kind: str
    """`checkpoint`, `samples`, `adapter`, `best`, `plot` or `watch`"""
    path: Path
    step: int | None = None


@dataclass(frozen=True)
class Preview:
    """Pictures that are being drawn, as they would look now; sent on `Control.sample_now`."""

    step: int
    images: tuple[Any, ...] = field(repr=False)
    """The pictures of the batch (PIL)"""


@dataclass(frozen=True)
class Note:
    """Event: a message or warning for the user."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Done:
    """Event: the innermost open phase has ended, with or without an error."""

    name: str
    seconds: float


Event = Phase | Advance | Step | Artifact | Preview | Note | Done
Reporter = Callable[[Event], None]


class StoppedError(DiffgraftError):
    """The operation was stopped through its `Control`; a training run has then written a checkpoint."""


class Control:
    """Requests from another thread to a long operation, which answers them after the current step or unit of work."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._pending: set[str] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Request a stop; training writes a checkpoint first."""
        self._stop.set()

    def sample_now(self) -> None:
        """Request samples from a training run, or previews of pictures that are being drawn, after the current step."""
        self._request("sample")

    def save_now(self) -> None:
        """Request a checkpoint from a training run after its current step."""
        self._request("save")

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stop.is_set()

    def pop_request(self, kind: str) -> bool:
        """Whether a request of this kind, ``sample`` or ``save``, is pending; the request is then cleared."""
        with self._lock:
            is_pending = kind in self._pending
            self._pending.discard(kind)
            return is_pending

    def _request(self, kind: str) -> None:
        with self._lock:
            self._pending.add(kind)


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)
_control: ContextVar[Control | None] = ContextVar("control", default=None)


@contextmanager
def reporting(reporter: Reporter | None = None, control: Control | None = None) -> Iterator[None]:
    """Set the reporter and the control of this thread within the block; None leaves the outer one in place."""
    reporter_token = None if reporter is None else _reporter.set(reporter)
    control_token = None if control is None else _control.set(control)
    try:
        yield
    finally:
        if reporter_token is not None:
            _reporter.reset(reporter_token)
        if control_token is not None:
            _control.reset(control_token)


def control() -> Control:
    """Return the control set by `reporting`, or a new one that nobody uses."""
    return _control.get() or Control()


def silent(_: Event) -> None:
    """Ignore an event: the reporter that shows nothing."""


def emit(event: Event) -> None:
    """Send an event to the reporter of the current thread."""
    reporter = _reporter.get()
    if reporter is None:
        reporter = default_reporter()
        _reporter.set(reporter)
    reporter(event)


class Tracker:
    """Counter of the units of work of a phase."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        self.name, self.total, self.done = name, total, done

    def advance(
        self, count: int = 1, remaining: float | None = None, values: Mapping[str, float] | None = None
    ) -> None:
        """Report that `count` more units are done.

        Args:
            count: number of units.
            remaining: estimated seconds until the phase ends.
            values: values to show with the progress, such as the loss.

        Raises:
            StoppedError: a stop was requested.
        """
        self.done += count
        emit(Advance(self.name, self.done, self.total, remaining, values or {}))
        check_stop()


@contextmanager
def phase(name: str, total: int | None = None, done: int = 0) -> Iterator[Tracker]:
    """Report the block as a phase of `total` units, of which `done` are done; yield a `Tracker` to advance it."""
    start = time.monotonic()
    emit(Phase(name, total, done))
    try:
        yield Tracker(name, total, done)
    finally:
        emit(Done(name, time.monotonic() - start))


def track(items: Collection[T], name: str, min_items: int = 0) -> Iterator[T]:
    """Yield the items and report them as a phase called `name`; fewer than `min_items` items are not reported.

    Raises:
        StoppedError: a stop was requested.
    """
    if len(items) < min_items:
        yield from items
        return
    with phase(name, len(items)) as tracker:
        for item in items:
            yield item
            tracker.advance()


def check_stop() -> None:
    """Raise StoppedError if a stop was requested."""
    if (current := _control.get()) is not None and current.is_stopping:
        raise StoppedError("Stopped on request.")


class Bars:
    """Reporter that shows progress bars in a terminal, one for each phase that has not ended."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bars: list[Any] = []

    def __call__(self, event: Event) -> None:
        from tqdm import tqdm

        match event:
            case Phase(name, total, done):
                layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]" if total else None
                bar = tqdm(
                    total=total, initial=done, desc=printable(name), leave=False, file=self._stream, bar_format=layout
                )
                self._bars.append(bar)
            case Advance(_, done, _, remaining, values) if self._bars:
                bar = self._bars[-1]
                if values:
                    bar.set_postfix(values, refresh=False)
                if remaining is not None:
                    eta = _clock(remaining)
                    bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<" + eta + "{postfix}]"
                bar.update(done - bar.n)
            case Done() if self._bars:
                self._bars.pop().close()
            case Note(text):
                tqdm.write(printable(text), file=self._stream or sys.stderr)


class Lines:
    """Reporter that writes lines for logs: for each phase one every `every` seconds, and every file and note."""

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
                    items = [f"{name}: {done}" + (f"/{total}" if total else "")]
                    items += [f"{key} {value:.4g}" for key, value in values.items()]
                    items += [f"{_clock(remaining)} left"] if remaining is not None else []
                    self._write(", ".join(items))
            case Artifact(kind, path):
                self._write(f"{kind}: {path}")
            case Note(text, is_warning):
                self._write(f"warning: {text}" if is_warning else text)

    def _write(self, line: str) -> None:
        print(printable(line), file=self._stream or sys.stderr, flush=True)


class JsonLines:
    """Reporter that writes each event as a JSON object on a line: its type under ``event``, and its fields."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        import json
        import math

        def plain(value: Any) -> Any:  # JSON has no NaN and no infinity
            if isinstance(value, Mapping):
                return {str(key): plain(item) for key, item in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        if isinstance(event, Preview):  # pictures are no JSON
            return
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
"""Value of ``--progress`` → factory of the reporter"""


def default_reporter() -> Reporter:
    """Return `Bars` if stderr is a terminal and ``TQDM_DISABLE`` is not set, else `Lines`."""
    is_disabled = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return Bars() if sys.stderr.isatty() and not is_disabled else Lines()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
