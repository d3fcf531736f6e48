"""Ctrl-C at a moment that is known."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diffgraft.trainers.hooks.metrics import Entry, Metrics


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """A run within the block gets Ctrl-C as it records that step, and passes it on."""
    real = Metrics.add

    def add(record: Metrics, entry: Entry) -> None:
        real(record, entry)
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "add", add)
        with pytest.raises(KeyboardInterrupt):
            yield
