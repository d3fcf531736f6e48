"""Third-party libraries: importing bitsandbytes on demand, and silencing the logs of diffusers and transformers."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def import_bitsandbytes() -> Any:
    """Import bitsandbytes, even though the command line hides it from libraries that would import it needlessly."""
    if sys.modules.get("bitsandbytes", bool) is None:
        del sys.modules["bitsandbytes"]
    return import_module("bitsandbytes")


def mask_padding_without_torchvision() -> None:
    """Let diffusers' Cosmos transformers run without torchvision, of which they only use `resize`, for a mask.

    Diffusers imports it if it is there, and otherwise has no name for it.
    """
    from diffusers.models.transformers import transformer_cosmos
    from torch.nn.functional import interpolate

    if not hasattr(transformer_cosmos, "transforms"):

        def resize(mask: Any, size: Any, interpolation: str) -> Any:
            return interpolate(mask, tuple(size), mode=interpolation)

        mode = SimpleNamespace(NEAREST="nearest")
        stand_in = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=mode)
        transformer_cosmos.transforms = stand_in


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block diffusers, transformers and bitsandbytes log errors only and show no progress bars."""
    others = logging.getLogger("bitsandbytes")
    if others.level != logging.ERROR:  # each change of a level empties the caches of all loggers
        others.setLevel(logging.ERROR)  # not reset: it warns when peft imports it
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    previous = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, has_bars) in zip(libraries, previous, strict=True):
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()
