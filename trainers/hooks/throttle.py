"""Work that is done again and again on the way, and never takes more than a small share of the time."""

import time
from collections.abc import Callable


class Throttle:
    """`work`, done when it is called for after as long a pause as makes its cost a `share` of the time."""

    def __init__(
        self,
        work: Callable[[], object],
        share: float = 0.01,
        expected: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`expected` is what it will take the first time, in seconds."""
        self._work, self._share, self._clock = work, share, clock
        self._next = clock() + expected / share

    def __call__(self) -> None:
        """Do it, if it is time again."""
        begun = self._clock()
        if begun < self._next:
            return
        self._work()
        ended = self._clock()
        self._next = ended + (ended - begun) / self._share
