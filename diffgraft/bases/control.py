"""Networks that steer a denoiser by changing the inputs of its layers, instead of adding to its skip connections."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class PictureLayer:
    """A linear layer of a denoiser with inputs [n, tokens, width], one token for each square of the picture."""

    path: str
    """Path of the layer inside the denoiser"""
    pixels: int
    """Side of the square of a token, in pixels of the picture"""
    is_usual: bool
    """Whether new networks steer the layer; the others are steered only by files that say so"""


class InputControl(nn.Module):
    """A control network that acts on inputs of the denoiser's layers while the denoiser runs."""

    @abstractmethod
    def acting(self, pictures: Tensor, strength: float) -> AbstractContextManager[None]:
        """Return a block within which the layers are steered.

        Args:
            pictures: condition pictures [n, 3, height, width] in pixels, with values from 0 to 1, for n predictions.
            strength: factor on what the network adds to the inputs.
        """

    def enable_gradient_checkpointing(self, run: Callable[..., Any] | None = None) -> None:
        """Do nothing: it runs within the denoiser's blocks, and is computed again together with them."""
