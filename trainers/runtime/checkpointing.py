"""Gradient checkpointing: the backward pass runs blocks of the denoiser again, with the adapter as it was before."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from diffgraft.adapters.method import Attached
from diffgraft.adapters.rank_schedule import timesteps_as_now

_running = threading.local()
"""Has `depth`, the number of checkpointed blocks that this thread is computing; PyTorch has threads for gradients"""


def recomputing(network: nn.Module, adapter: Attached) -> Callable[..., Any]:
    """Return the function with which `network` runs its checkpointed blocks, for `enable_gradient_checkpointing`.

    An objective may call the network several times before its backward pass, with other timesteps, or with the adapter
    at other strengths; each call is computed again as it was.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        contexts = _marked(), _marked(adapter.as_now(), timesteps_as_now(network))
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)

    return run


def is_checkpointed() -> bool:
    """Whether a checkpointed block is computing now, which keeps no weights until its gradients are computed."""
    return bool(getattr(_running, "depth", 0))


@contextmanager
def _marked(*contexts: AbstractContextManager[None]) -> Iterator[None]:
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield
    finally:
        _running.depth -= 1
