"""Libraries that talk while they load, asked to keep it to errors."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def import_bitsandbytes() -> Any:
    """The package bitsandbytes, also where the command line hides it from libraries that would load it unasked."""
    if sys.modules.get("bitsandbytes", bool) is None:
        del sys.modules["bitsandbytes"]
    return import_module("bitsandbytes")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block diffusers, transformers and bitsandbytes log errors only and draw no bars of their own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns once, when peft imports it
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
