"""Losses of held-out pictures with adapters, at noise that is the same for all of them."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffgraft.adapters.adapter import Adapter
from diffgraft.bases import Base
from diffgraft.evaluation.target import HeldOutPicture
from diffgraft.generation.graft import graft
from diffgraft.trainers.hooks.validation_set import validation_set_from_images

_PAIRS = 16
"""Pairs of timestep and noise in each set, at least"""


class HeldOutLosses:
    """Held-out pictures, encoded and paired with several independent sets of noise."""

    def __init__(self, base: Base, pictures: Sequence[HeldOutPicture], sets: int) -> None:
        """Encode the pictures.

        Args:
            base: the base.
            pictures: held-out pictures with their prompts.
            sets: number of sets of noise, over which losses spread.
        """
        self._base, self._sets = base, sets
        self._prompts = [picture.prompt for picture in pictures]
        masks = None
        if any(picture.mask is not None for picture in pictures):
            masks = [picture.mask or Image.new("L", picture.image.size, 255) for picture in pictures]
        images = [picture.image for picture in pictures]
        self._held = [
            validation_set_from_images(base, images, masks, max(_PAIRS, len(images)), seed) for seed in range(sets)
        ]

    @torch.no_grad()
    def of(self, adapter: Adapter | None, strength: float) -> Tensor:
        """Return the losses with an adapter, [sets]; without one, of the base alone."""
        if adapter is None:
            return self._losses()
        with graft(self._base, {adapter: strength}):
            return self._losses()

    def _losses(self) -> Tensor:
        return torch.tensor([held.loss(self._base, self._prompts) for held in self._held])
