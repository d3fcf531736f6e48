"""Custom Diffusion as diffusers saves it: ``<attention>.processor.to_k_custom_diffusion.weight``. Read only.

Keys and values of the cross-attention, and where they were trained, too, queries and outputs. The words it taught lie
in files of their own, which `embedding` reads.
Source: diffusers 0.42.1, ``models/attention_processor.py`` and ``loaders/unet.py``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import read_metadata
from diffgraft.adapters.formats.key_errors import UnknownKeyError
from diffgraft.adapters.registry import read_delta

_KEY = re.compile(
    r"(?:unet\.)?(?P<path>[\w.]+)\.processor\.to_(?P<layer>q|k|v|out)_custom_diffusion(?:\.0)?\.(?P<leaf>weight|bias)"
)


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the keys look like this dialect."""
    return any(_KEY.fullmatch(key) for key in tensors)


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Every key is used, or named in a ValueError."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise UnknownKeyError(key, "<attention>.processor.to_<k or v>_custom_diffusion.weight")
        layer = "to_out.0" if found["layer"] == "out" else f"to_{found['layer']}"
        modules.setdefault(f"unet.{found['path']}.{layer}", {})[found["leaf"]] = value
    deltas = {}
    for path, leaves in modules.items():
        try:
            deltas[path] = (read_delta("replacement", leaves, None),)
        except ValueError as error:
            raise ValueError(f"{path} is not whole: {error}") from error
    return Adapter(deltas, read_metadata(header, method="custom-diffusion"))


DIALECT = Dialect(
    name="custom-diffusion",
    summary="Custom Diffusion as diffusers saves it",
    order=90,
    recognises=recognises,
    read=read,
)
