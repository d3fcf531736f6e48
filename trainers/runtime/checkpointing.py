"""Gradient checkpointing: the backward pass runs blocks of the denoiser again, with the adapter as it was before."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from diffgraft.adapters.method import Attached
from diffgraft.adapters.rank_schedule import timesteps_as_now


def recomputing(network: nn.Module, adapter: Attached) -> Callable[..., Any]:
    """Return the function with which `network` runs its checkpointed blocks, for `enable_gradient_checkpointing`.

    An objective may call the network several times before its backward pass, with other timesteps, or with the adapter
    at other strengths; each call is computed again as it was.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        contexts = nullcontext(), _both(adapter.as_now(), timesteps_as_now(network))
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)

    return run


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield
