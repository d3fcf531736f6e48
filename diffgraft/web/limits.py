"""A bound on how often something may happen."""

import threading
import time
from collections import deque
from collections.abc import Callable

from diffgraft.errors import DiffgraftError


class TooManyJobsError(DiffgraftError):
    """More jobs were requested than the limits allow."""


class RateLimit:
    """At most `count` events in any minute."""

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    @property
    def is_reached(self) -> bool:
        """Whether another event now would exceed the limit."""
        with self._lock:
            self._forget()
            return len(self._times) >= self._count

    def take(self) -> bool:
        """Count an event and return True, or return False if it would be too many."""
        with self._lock:
            self._forget()
            if len(self._times) >= self._count:
                return False
            self._times.append(self._clock())
            return True

    def _forget(self) -> None:
        start = self._clock() - 60
        while self._times and self._times[0] <= start:
            self._times.popleft()
