"""How long the rest of a run will take: its steps, and what comes between them every so many."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

_WINDOW = 100
"""So many of the last steps say how long one takes"""


class Eta:
    """Takes the time of steps and pauses; the first step, in which much is set up, counts while it is the only one."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._clock = steps, clock
        self._took: deque[float] = deque(maxlen=_WINDOW)
        self._first = 0.0
        self._pauses: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        """Steps between pauses of a kind → the kind → seconds of each"""
        self._since, self._paused = clock(), 0.0

    def update(self) -> None:
        """A step is done, the time of which went by since the last one but for pauses."""
        now = self._clock()
        took, self._since, self._paused = now - self._since - self._paused, now, 0.0
        if self._first:
            self._took.append(took)
        self._first = self._first or took

    @contextmanager
    def pause(self, kind: str, every: int) -> Iterator[None]:
        """What is done within comes again every so many steps."""
        begun = self._clock()
        yield
        took = self._clock() - begun
        self._pauses[every][kind].append(took)
        self._paused += took

    def remaining(self, done: int) -> float | None:
        """Seconds from after step `done` to the end; None as long as nothing is known."""
        if not self._first:
            return None
        step = fmean(self._took) if self._took else self._first
        pauses = sum(
            (self._steps // every - done // every) * fmean(took)
            for every, kinds in self._pauses.items()
            for took in kinds.values()
        )
        return (self._steps - done) * step + pauses
