"""Networks in adapter files that steer the denoiser by condition pictures."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import nn

from diffgraft.adapters.adapter import Network
from diffgraft.bases import Base

PART = "control"
"""Path of a control network, and first part of the names of its parameters"""


class ConditionedNetwork(Network):
    """A trained network that needs a condition picture; it is built for a base instead of being hooked into it."""

    reads_base = False
    """Whether `build` reads weights of the base, which then must not have adapters merged into them"""

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:  # noqa: ARG002
        raise ValueError("it is a control network, which needs a condition picture: give it as control_net instead")

    @abstractmethod
    def build(self, base: Base) -> nn.Module:
        """Build the network for `base`, frozen, in float32 on the CPU, as `ControlSignal.network`.

        Raises:
            ValueError: it was made for another base, or its tensors and settings do not fit together.
        """
