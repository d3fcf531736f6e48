"""A moving average of the trained weights, which jumps less than they do; diffusers keeps it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_STEP = "step"


class Ema:
    """The exponential moving average of parameters, with the decay growing towards its value in the first steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = parameters
        self._kept = EMAModel(list(parameters.values()), decay=decay)

    def step(self) -> None:
        """Take in what the parameters are now."""
        self._kept.step(list(self._parameters.values()))

    def copy_to(self) -> None:
        """Give the parameters the average's values."""
        self._kept.copy_to(list(self._parameters.values()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters have the average's values; afterwards the very bits from before."""
        values = list(self._parameters.values())
        self._kept.store(values)
        self.copy_to()
        try:
            yield
        finally:
            self._kept.restore(values)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        shadows = zip(self._parameters, self._kept.shadow_params, strict=True)
        kept = {f"average.{name}": value.detach().cpu() for name, value in shadows}
        return {**kept, _STEP: torch.tensor(self._kept.optimization_step)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Go on from what a checkpoint has kept; start with what the parameters are now where it has kept nothing."""
        for (name, now), value in zip(self._parameters.items(), self._kept.shadow_params, strict=True):
            value.copy_(now if tensors is None else tensors[f"average.{name}"])
        self._kept.optimization_step = 0 if tensors is None else int(tensors[_STEP])
