"""A thread of the studio that looks after something several times a second."""

import sys
import threading
from abc import ABC, abstractmethod

_PAUSE = 0.3
"""Seconds between two looks"""


class PollingThread(threading.Thread, ABC):
    """Thread that calls `look` until it is ended."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._ending = threading.Event()

    def run(self) -> None:
        while not self._ending.wait(_PAUSE):
            try:
                self.look()
            except OSError as error:  # a full disk, say: the next look may succeed
                print(f"The queue cannot be used: {error}", file=sys.stderr)

    @abstractmethod
    def look(self) -> None:
        """Check once for changes, and act on them."""

    def end(self) -> None:
        """End the thread; processes that it started go on."""
        self._ending.set()
        if self.is_alive():
            self.join(5)
