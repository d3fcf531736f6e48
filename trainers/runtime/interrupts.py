"""Ctrl-C at a time that suits: never between the halves of an update."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def defer_sigint() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Ctrl-C within the block is raised at its end.

    What the block is given opens parts of it again: there Ctrl-C is raised at once, and what follows in the block's own
    `finally` is deferred again. Outside of the main thread, which alone gets signals, nothing is held back.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield nullcontext
        return
    came: list[tuple[Any, ...]] = []

    def hold(*told: Any) -> None:
        came.append(told)

    @contextmanager
    def opened() -> Iterator[None]:
        signal.signal(signal.SIGINT, usual)
        try:
            if came:
                usual(*came.pop())
            yield
        finally:
            signal.signal(signal.SIGINT, hold)

    signal.signal(signal.SIGINT, hold)
    try:
        yield opened
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        usual(*came.pop())
