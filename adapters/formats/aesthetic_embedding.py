"""Aesthetic embeddings of webui: a bare tensor [1, 768] or [768] in a ``.pt`` file. Read only.

Source: AUTOMATIC1111/stable-diffusion-webui-aesthetic-gradients, ``aesthetic_clip.py``.
"""

from collections.abc import Mapping

from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import read_metadata
from diffgraft.adapters.registry import read_network


def recognises(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether the file is a single tensor without a name."""
    return set(tensors) == {""}


def read(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layers: int | None = None,  # noqa: ARG001  (its names do not count layers)
) -> Adapter:
    """Build the adapter. Raises ValueError if the tensor is not a single row of numbers."""
    network = read_network("aesthetic", {"embedding": tensors[""]}, {})
    return Adapter({}, read_metadata(header, method="aesthetic"), (network,))


DIALECT = Dialect(
    name="aesthetic",
    summary="aesthetic embeddings of webui",
    order=100,
    recognises=recognises,
    read=read,
)
