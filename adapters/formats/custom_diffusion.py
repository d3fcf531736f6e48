"""Custom Diffusion as diffusers saves it: ``<attention>.processor.to_k_custom_diffusion.weight``. Read only.

Files hold the keys and values of the cross-attentions and, if they were trained too, queries and outputs. Learned words
are in separate files, which `embedding` reads.
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
    """Build the adapter. Raises ValueError for an unknown key, or for a module with missing tensors."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnknownKeyError(key, "<attention>.processor.to_<q, k, v or out>_custom_diffusion.weight")
        layer = "to_out.0" if match["layer"] == "out" else f"to_{match['layer']}"
        modules.setdefault(f"unet.{match['path']}.{layer}", {})[match["leaf"]] = value
    deltas = {}
    for path, leaves in modules.items():
        try:
            deltas[path] = (read_delta("replacement", leaves, None),)
        except ValueError as error:
            raise ValueError(f"the tensors of {path} are incomplete: {error}") from error
    return Adapter(deltas, read_metadata(header, method="custom-diffusion"))


DIALECT = Dialect(
    name="custom-diffusion",
    summary="Custom Diffusion as diffusers saves it",
    order=90,
    recognises=recognises,
    read=read,
)
