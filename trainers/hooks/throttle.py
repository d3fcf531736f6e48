"""Rate limiting of recurring work, so that it takes only a small share of the run's time."""

import time
from collections.abc import Callable


class Throttle:
    """Calls `work`, but only after a pause long enough for it to take at most `share` of the time."""

    def __init__(
        self,
        work: Callable[[], object],
        share: float = 0.01,
        expected: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store the work and its limit.

        Args:
            work: the function to call.
            share: fraction of the time that the work may take, in 0 … 1.
            expected: assumed duration of the first call, in seconds.
            clock: current time in seconds.
        """
        self._work, self._share, self._clock = work, share, clock
        self._next = clock() + expected / share

    def __call__(self) -> None:
        """Call `work` unless its last call was too recent."""
        start = self._clock()
        if start < self._next:
            return
        self._work()
        end = self._clock()
        self._next = end + (end - start) / self._share
