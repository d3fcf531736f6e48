"""Exponential moving average (EMA) of the trained parameters, computed by diffusers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_STEP = "step"
_AVERAGE = "average."
"""Prefix of the names of averages in checkpoints"""


class Ema:
    """Exponential moving average of parameters; its decay grows to `decay` over the first steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = parameters
        self._model = EMAModel(list(parameters.values()), decay=decay)

    def step(self) -> None:
        """Update the average with the current values of the parameters."""
        self._model.step(list(self._parameters.values()))

    def copy_to(self) -> None:
        """Overwrite the parameters with the average."""
        self._model.copy_to(list(self._parameters.values()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters have the average's values; afterwards their own values again, bit for bit."""
        values = list(self._parameters.values())
        self._model.store(values)
        self.copy_to()
        try:
            yield
        finally:
            self._model.restore(values)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint stores: the average of each parameter by name, and the number of updates."""
        shadows = zip(self._parameters, self._model.shadow_params, strict=True)
        averages = {f"{_AVERAGE}{name}": value.detach().cpu() for name, value in shadows}
        return {**averages, _STEP: torch.tensor(self._model.optimization_step)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Restore the average from a checkpoint's `tensors`; with None, restart it from the current parameters."""
        for (name, parameter), average in zip(self._parameters.items(), self._model.shadow_params, strict=True):
            average.copy_(parameter if tensors is None else tensors[f"{_AVERAGE}{name}"])
        self._model.optimization_step = 0 if tensors is None else int(tensors[_STEP])


def averages_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the average of each parameter by name, of the tensors that a checkpoint stores."""
    return {name.removeprefix(_AVERAGE): value for name, value in tensors.items() if name != _STEP}
