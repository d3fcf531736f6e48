"""Networks in adapter files that steer the denoiser by condition pictures."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.method import refuse
from diffgraft.bases import Base

PART = "control"
"""Path of a control network, and first part of the names of its parameters"""


N = TypeVar("N", bound="ConditionedNetwork")


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


def only_network(adapter: Adapter, kind: type[N]) -> N:
    """Return the only network of an adapter that holds nothing else, to start training from.

    Raises:
        ValueError: it holds something else.
    """
    refuse(adapter, "deltas", "tokens")
    network = adapter.networks[0] if len(adapter.networks) == 1 else None
    if isinstance(network, kind):
        return network
    kinds = ", ".join(own.kind for own in adapter.networks) or "none"
    raise ValueError(f"it holds {len(adapter.networks)} networks ({kinds}), but exactly one {kind.kind} is needed")
