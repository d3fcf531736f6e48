"""Estimate of the time that is left in a run, from its steps and the periodic work of hooks between them."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

_WINDOW = 100
"""Number of recent steps whose mean duration is used"""


class TimeLeft:
    """Measures steps and pauses and estimates the time left; the slow first step counts only until the second."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`steps`: number of steps of the whole run. `clock`: current time in seconds."""
        self._steps, self._clock = steps, clock
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._first = 0.0
        self._pauses: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        """Interval in steps → kind of pause → seconds that each took"""
        self._last_update, self._paused = clock(), 0.0

    def end_step(self) -> None:
        """Record that a step was completed; it took the time since the last update, less pauses."""
        now = self._clock()
        duration = now - self._last_update - self._paused
        self._last_update, self._paused = now, 0.0
        if self._first:
            self._durations.append(duration)
        self._first = self._first or duration

    @contextmanager
    def pause(self, kind: str, every: int) -> Iterator[None]:
        """Measure the block as a pause between steps that recurs every `every` steps."""
        start = self._clock()
        yield
        duration = self._clock() - start
        self._pauses[every][kind].append(duration)
        self._paused += duration

    def remaining(self, done: int) -> float | None:
        """Seconds left after step `done`; None before the first step was measured."""
        if not self._first:
            return None
        step = fmean(self._durations) if self._durations else self._first
        pauses = sum(
            (self._steps // every - done // every) * fmean(durations)
            for every, kinds in self._pauses.items()
            for durations in kinds.values()
        )
        return (self._steps - done) * step + pauses
