"""Access to the Hugging Face hub with a short timeout: its client retries for half a minute if it is unreachable."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_SECONDS = 5
"""Seconds to wait for an answer of the hub"""


def hub_reachable(kind: Literal["model", "dataset"], name: str) -> bool:
    """Whether the hub answers for a model or data set called `name`.

    Raises:
        RepositoryNotFoundError: the hub answers that there is no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        (HfApi().dataset_info if kind == "dataset" else HfApi().model_info)(name, timeout=_SECONDS)
    except RepositoryNotFoundError:
        raise
    except Exception:  # no network, no answer in time, or offline mode: the local cache may have it
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Within the block models and data sets are looked up in the local cache only."""
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous
