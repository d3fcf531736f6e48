"""Aesthetic gradients: a mean image embedding of CLIP's, towards which a text encoder is tuned for each prompt.

Gallego 2022 (arXiv:2209.12330, section 2). It is a picture's embedding and no change of weights: to steer by it takes
the projection of CLIP's text encoder, which Stable Diffusion's parts leave away. Read and kept; not drawn with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffgraft.adapters.adapter import Network


@dataclass(frozen=True, eq=False, repr=False)
class AestheticEmbedding(Network):
    """The mean embedding of the pictures that somebody liked."""

    tensors: Mapping[str, Tensor]
    """``embedding`` [1, 768]"""
    settings: Mapping[str, Any] = field(default_factory=dict)

    kind = "aesthetic"

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:  # noqa: ARG002
        raise ValueError(
            "it is an aesthetic embedding, and to steer by it takes the projection of CLIP's text encoder, which bases "
            "of Stable Diffusion do not hold"
        )


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """From its tensor."""
    embedding = tensors.get("embedding")
    if embedding is None or len(tensors) > 1 or embedding.ndim not in (1, 2) or embedding.shape[:-1].numel() != 1:
        raise ValueError("an aesthetic embedding is one row of numbers")
    return AestheticEmbedding({"embedding": embedding.view(1, -1)}, dict(settings))


NETWORKS = {"aesthetic": read_network}
