"""The hub, asked once and not for long: its own client tries for half a minute where it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_SECONDS = 5
"""How long the hub has to answer"""


def answers(kind: Literal["model", "dataset"], name: str) -> bool:
    """Whether the hub can be asked for what is called `name`.

    Raises:
        RepositoryNotFoundError: the hub has none of that name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        (HfApi().dataset_info if kind == "dataset" else HfApi().model_info)(name, timeout=_SECONDS)
    except RepositoryNotFoundError:
        raise
    except Exception:  # no network, no answer in time, told to stay offline: what was brought earlier may be there
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Within the block models and data sets are looked for among those that were brought earlier alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
