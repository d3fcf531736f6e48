"""Deferral of Ctrl-C, so that it never interrupts an optimizer update halfway."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def defer_sigint() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Defer Ctrl-C within the block to its end.

    The block receives a function that returns a context manager: within that one Ctrl-C interrupts at once, and after
    it, for example in the outer block's `finally`, it is deferred again. Only the main thread receives signals, so in
    other threads nothing is deferred.
    """
    original = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(original):
        yield nullcontext
        return
    pending: list[tuple[Any, ...]] = []

    def defer(*signal_args: Any) -> None:
        pending.append(signal_args)

    @contextmanager
    def interruptible() -> Iterator[None]:
        signal.signal(signal.SIGINT, original)
        try:
            if pending:
                original(*pending.pop())
            yield
        finally:
            signal.signal(signal.SIGINT, defer)

    signal.signal(signal.SIGINT, defer)
    try:
        yield interruptible
    finally:
        signal.signal(signal.SIGINT, original)
    if pending:
        original(*pending.pop())
