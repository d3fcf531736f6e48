"""Aesthetic gradients: a mean image embedding of CLIP's, towards which a text encoder is tuned for each prompt.

Gallego 2022 (arXiv:2209.12330, section 2). The file holds an image embedding and no change of weights. Using it needs
the projection of CLIP's text encoder, which Stable Diffusion does not include, so it is read and kept, but not applied.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffgraft.adapters.adapter import Network


@dataclass(frozen=True, eq=False, repr=False)
class AestheticEmbedding(Network):
    """Mean CLIP image embedding of pictures that somebody liked."""

    tensors: Mapping[str, Tensor]
    """``embedding`` [1, 768]"""
    settings: Mapping[str, Any] = field(default_factory=dict)

    kind = "aesthetic"

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:  # noqa: ARG002
        raise ValueError(
            "it is an aesthetic embedding, which needs the projection of CLIP's text encoder; Stable Diffusion does "
            "not include it"
        )


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the embedding from its single tensor. Raises ValueError if that is not a single row of numbers."""
    embedding = tensors.get("embedding")
    if embedding is None or len(tensors) > 1 or embedding.ndim not in (1, 2) or embedding.shape[:-1].numel() != 1:
        raise ValueError("expected an aesthetic embedding, which is a single row of numbers")
    return AestheticEmbedding({"embedding": embedding.view(1, -1)}, dict(settings))


NETWORKS = {"aesthetic": read_network}
