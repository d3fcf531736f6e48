"""Aesthetic embeddings of webui: a bare tensor [1, 768] or [768] in a ``.pt`` file.

Source: AUTOMATIC1111/stable-diffusion-webui-aesthetic-gradients, ``aesthetic_clip.py``.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.adapters.dialect import Dialect
from diffgraft.adapters.formats.header import read_metadata
from diffgraft.adapters.registry import read_network
from diffgraft.files import atomic_write


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


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the bare tensor. Raises ValueError for anything but an aesthetic embedding without a projection."""
    kinds = [network.kind for network in adapter.networks]
    if adapter.deltas or adapter.tokens or kinds != ["aesthetic"]:
        raise ValueError("such files hold one aesthetic embedding, and nothing else")
    if "projection" in adapter.networks[0].tensors:
        raise ValueError(
            "such files have no room for the projection beside the embedding: make one without it by `diffgraft "
            "aesthetic … --output NAME.pt`"
        )
    return {"": adapter.networks[0].tensors["embedding"]}, {}


def store(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:  # noqa: ARG001  (it has none)
    """Write the file, and return its path. Raises ValueError if webui does not list files with such a name."""
    if path.suffix != ".pt":
        raise ValueError(f"webui lists only embeddings that end in .pt: name it {path.with_suffix('.pt').name}")
    with atomic_write(path) as partial:
        torch.save(tensors[""], partial)
    return path


def suffix(adapter: Adapter) -> str:  # noqa: ARG001  (the suffix of other dialects depends on it)
    """Return ``.pt``."""
    return ".pt"


DIALECT = Dialect(
    name="aesthetic",
    summary="aesthetic embeddings of webui",
    order=100,
    recognises=recognises,
    read=read,
    write=write,
    store=store,
    suffix=suffix,
    holds_networks=True,
    keeps_metadata=False,
)
