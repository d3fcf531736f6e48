"""ControlNet: a network beside the denoiser that steers it by condition pictures, such as edges.

Zhang et al. 2023, arXiv:2302.05543, section 3: a trainable copy of the denoiser's encoder reads noisy latents, prompt
and condition picture, and its outputs, which begin at zero, are added to those of the frozen encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.control import PART, ConditionedNetwork
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Spec, only_network
from diffgraft.adapters.patch import to_cpu_float32
from diffgraft.bases import Base
from diffgraft.bases.loading import base_of
from diffgraft.errors import one_line


@dataclass(frozen=True, eq=False, repr=False)
class ControlNetwork(ConditionedNetwork):
    """A trained control network, in memory."""

    tensors: Mapping[str, Tensor]
    """Weights by the names of `Family.control_network`"""
    settings: Mapping[str, Any]
    """`Family.control_settings`"""

    kind = "controlnet"

    def build(self, base: Base) -> nn.Module:
        try:
            network = base.family.control_network(base, self.settings)
            network.load_state_dict({name: value.float() for name, value in self.tensors.items()}, assign=True)
        except (TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"its weights and settings do not fit together: {one_line(error, 300)}") from error
        return network.requires_grad_(False).eval()


class AttachedControl(Attached):
    """A control network that is trained; the base's own modules are not touched."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        base = target if isinstance(target, Base) else base_of(target)
        self._base = base
        with torch.random.fork_rng(devices=[]):  # the first convolutions begin with random weights
            torch.manual_seed(spec.seed)
            network = base.family.control_network(base)
        self.network = network.to(base.device).requires_grad_(True).train()

    @property
    def control(self) -> nn.Module:
        return self.network

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{PART}.{name}": value for name, value in self.network.named_parameters()}

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        settings = self._base.family.control_settings(self.network)
        return Adapter({}, metadata, (ControlNetwork(to_cpu_float32(self.network.state_dict()), settings),))

    def paths(self) -> dict[str, str]:
        """Path of each parameter's module: the network counts as one, as only its last layers have gradients at first.

        They begin at zero, so that nothing flows through them before the first update.
        """
        return dict.fromkeys(self.trainable(), PART)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only control network of `adapter`."""
        source = only_network(adapter, ControlNetwork)
        self.network = source.build(self._base).to(self._base.device).requires_grad_(True).train()
        return set(self.paths().values())

    def detach(self) -> None:
        """Do nothing, as the base is not changed."""


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the network from tensors and settings; whether they fit together is seen when it is built for a base."""
    return ControlNetwork(dict(tensors), dict(settings))


METHOD = Method(
    name="controlnet",
    summary="a network that steers drawing by condition pictures, such as edges; needs the task `control`",
    attach=AttachedControl,
    unsupported={
        **NO_FACTORS,
        "layers": "it is a network beside the denoiser",
        "text_encoder": "it is a network beside the denoiser",
        "sample_prompts": "samples have the prompts and condition pictures of training images",
    },
    needs_conditions=True,
    read_network=read_network,
)
