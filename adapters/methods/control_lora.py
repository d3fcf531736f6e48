"""Control-LoRA: a ControlNet that is the base's own encoder plus low-rank differences.

By Stability AI (stability-ComfyUI-nodes, ``control_lora_create.py``; there is no paper): of a ControlNet, files hold
what reads the condition picture and the output layers, and for each layer of the encoder only a low-rank difference
from the base,

    W_control = W_base + up · down

so that they are a tenth of its size, and training needs no second copy of the encoder.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.control import PART, ConditionedNetwork
from diffgraft.adapters.factors import FactorDelta, FactorLayer
from diffgraft.adapters.method import Attached, Method, Spec, only_network
from diffgraft.adapters.methods.controlnet import ControlNetwork
from diffgraft.adapters.methods.lora import LOW_RANK, low_rank
from diffgraft.adapters.patch import AttachedLayers, cast_like, is_autocast, to_cpu_float32, weight_shape
from diffgraft.bases import Base
from diffgraft.bases.loading import base_of
from diffgraft.bases.quantized import Quantized
from diffgraft.errors import DiffgraftError

_READER = "controlnet_cond_embedding"
"""Module that reads the condition picture"""
_OUTPUTS = ("controlnet_down_blocks", "controlnet_mid_block")
"""Output layers, which begin at zero"""
_OWN = (f"{_READER}.", *(f"{name}." for name in _OUTPUTS))
_LAST = f"{_READER}.conv_out"
"""Last layer of what reads the condition picture, which begins at zero as well"""
_FACTORS = {"lora_up": "up", "lora_down": "down"}
"""Leaf of a LoRA → its name in files"""


@dataclass(frozen=True, eq=False, repr=False)
class ControlLora(ConditionedNetwork):
    """A trained Control-LoRA, in memory."""

    tensors: Mapping[str, Tensor]
    """Tensors by the names of `Family.control_network`: of layers ``<path>.up`` [out, r, …ones] and ``<path>.down``
    [r, in, …kernel], and whole weights and biases of others"""
    settings: Mapping[str, Any]
    """Empty: everything else is as in the base"""

    kind = "control-lora"
    reads_base = True

    def build(self, base: Base) -> nn.Module:
        network = self._empty(base)
        state = self._state(network, lambda name: _value(base.denoiser, name))
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False).eval()

    def merged(self, base: Base, value: Callable[[str], Tensor]) -> ControlNetwork:
        """Return the ControlNet with whole weights.

        Args:
            base: base that it is for, possibly on the device ``meta``.
            value: function of the name of a parameter of the denoiser that returns it.

        Raises:
            ValueError: it was made for another base.
        """
        network = self._empty(base)
        return ControlNetwork(self._state(network, value), base.family.control_settings(network))

    def factors(self) -> dict[str, FactorDelta]:
        """Return the path of each layer with a difference → the difference. Raises ValueError if factors do not fit."""
        found = {}
        for name, up in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "up":
                if (down := self.tensors.get(f"{path}.down")) is None:
                    raise ValueError(f"{path}.down is missing")
                found[path] = low_rank(down, up)
        return found

    def whole(self) -> dict[str, Tensor]:
        """Return the tensors that are no factors, by name."""
        return {name: value for name, value in self.tensors.items() if name.rpartition(".")[2] not in ("up", "down")}

    def _empty(self, base: Base) -> nn.Module:
        """Build the network without values. Raises ValueError if a layer that reads the picture is missing."""
        names = [f"{_READER}.conv_in.weight"]
        names += [f"{_READER}.blocks.{number}.weight" for number in range(1, len(self.tensors), 2)]
        widths = [
            self.tensors[name].shape[0] for name in names if name in self.tensors and self.tensors[name].ndim == 4
        ]
        if len(widths) < 2:
            raise ValueError(f"{names[0]} or {names[1]} is missing")
        return base.family.empty_control_network(base, widths)

    def _state(self, network: nn.Module, value: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return all weights of a network in float32: differences added to values of the base, the others as they are.

        Raises:
            ValueError: a tensor is missing, of another shape, or of no module of the network.
        """
        factors, whole = self.factors(), self.whole()
        wanted = {name: tuple(own.shape) for name, own in network.state_dict().items()}
        unknown = [*(name for name in whole if name not in wanted)]
        unknown += [f"{path}.up" for path in factors if f"{path}.weight" not in wanted]
        if unknown:
            raise ValueError(f"it has {unknown[0]}, but a control network of this base has no such module")
        state = {}
        for name, shape in wanted.items():
            path, _, leaf = name.rpartition(".")
            if name not in whole and name.startswith(_OWN):
                raise ValueError(f"{name} is missing")
            own = whole[name].float() if name in whole else value(name).detach().float().cpu()
            if leaf == "weight" and path in factors:
                if not factors[path].fits(shape):
                    raise ValueError(f"the difference at {path} is not for a weight of {' × '.join(map(str, shape))}")
                own = own + factors[path].delta(shape)
            if tuple(own.shape) != shape:
                raise ValueError(f"{name} is {list(own.shape)}, and this base needs {list(shape)}")
            state[name] = own
        return state


def _value(denoiser: nn.Module, name: str) -> Tensor:
    """Return a parameter of the denoiser; that of a quantized layer is dequantized."""
    path, _, leaf = name.rpartition(".")
    layer = denoiser.get_submodule(path)
    if isinstance(layer, Quantized):
        weight, bias = layer.read()
        found = weight if leaf == "weight" else bias
        assert found is not None
        return found
    return layer.get_parameter(leaf)


class AttachedControlLora(Attached):
    """A Control-LoRA that is trained: its network has the base's own parameters, with LoRAs on top."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._base = base = target if isinstance(target, Base) else base_of(target)
        self._spec = spec
        self.network = _sharing(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self._begin()
        self._others: dict[str, Tensor] = {}
        """Whole weights and biases of the encoder in the file that the training started from; they are not trained"""
        encoder = {name for name, _ in self.network.named_modules()}
        part = base.family.denoiser
        paths = [path for path in spec.paths.get(part, ()) if path in encoder]
        if not paths:
            raise DiffgraftError("The encoder of this base has no such layers: set layers=all, or another value.")
        self.loras = self._put_on(paths)

    def _begin(self) -> None:
        """Give the layers that the base does not have random or zero values, and let them compute in float32."""
        device = self._base.device
        for name, module in _own_layers(self.network):
            if device.type != "meta":
                module.to_empty(device="cpu").reset_parameters()
                if not name.startswith(_READER) or name == _LAST:
                    for value in module.parameters():
                        nn.init.zeros_(value)
            module.to(device)
            module.register_forward_pre_hook(_as_weight)
        self.network.get_submodule(_READER).register_forward_hook(self._as_encoder)

    def _as_encoder(self, _module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out if is_autocast(out.device) else out.to(self._base.denoiser.dtype)

    def _put_on(self, paths: list[str]) -> AttachedLayers:
        """Put LoRAs with the scale 1 on layers of the network."""

        def make(_path: str, layer: nn.Module, generator: torch.Generator) -> FactorLayer:
            shape = weight_shape(layer)
            rank = min(self._spec.rank, shape[0], torch.Size(shape[1:]).numel())
            return FactorLayer(LOW_RANK, layer, rank, rank, generator)

        part = self._base.family.denoiser
        target = SimpleNamespace(**{part: self.network})
        return AttachedLayers(target, replace(self._spec, paths={part: paths}), make)

    @property
    def control(self) -> nn.Module:
        return self.network

    def trainable(self) -> dict[str, nn.Parameter]:
        own = {
            f"{PART}.{name}.{leaf}": value
            for name, module in _own_layers(self.network)
            for leaf, value in module.named_parameters()
        }
        return own | {f"{PART}.{name.partition('.')[2]}": value for name, value in self.loras.trainable().items()}

    def paths(self) -> dict[str, str]:
        """Path of each parameter's module: the network counts as one, as only its outputs have gradients at first."""
        return dict.fromkeys(self.trainable(), PART)

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        tensors = {
            f"{name}.{leaf}": value
            for name, module in _own_layers(self.network)
            for leaf, value in module.state_dict().items()
        }
        for path, layer in self.loras.adapter_layers().items():
            for leaf, value in layer.delta().leaves.items():
                tensors[f"{path.partition('.')[2]}.{_FACTORS[leaf]}"] = value
        return Adapter({}, metadata, (ControlLora(to_cpu_float32({**tensors, **self._others}), {}),))

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only Control-LoRA of `adapter`, with its layers and ranks.

        Whole weights and biases of the encoder in it are used, but not trained.
        """
        source = only_network(adapter, ControlLora)
        source.build(self._base)  # raises if it does not fit
        device, dtype = self._base.device, self._base.denoiser.dtype
        own = dict(_own_layers(self.network))
        for name, value in source.whole().items():
            path, _, leaf = name.rpartition(".")
            if path in own:
                own[path].get_parameter(leaf).copy_(value)
            else:
                self._others[name] = value
                frozen = nn.Parameter(value.to(device, dtype), requires_grad=False)
                setattr(self.network.get_submodule(path), leaf, frozen)
        factors = source.factors()
        self.loras.detach()
        self.loras = self._put_on(list(factors))
        part = self._base.family.denoiser
        self.loras.load(Adapter({f"{part}.{path}": (delta,) for path, delta in factors.items()}))
        return set(self.paths().values())

    def detach(self) -> None:
        """Do nothing, as the base is not changed."""


def _sharing(base: Base) -> nn.Module:
    """Build a control network with the base's own parameters; its other layers have no values yet."""
    network = base.family.empty_control_network(base)
    for path, module in [*network.named_modules()]:
        if not [*module.children()] and [*module.parameters()] and not f"{path}.".startswith(_OWN):
            network.set_submodule(path, _twin(base.denoiser.get_submodule(path)))
    return network.requires_grad_(False).train()


def _twin(module: nn.Module) -> nn.Module:
    """Return a second module with the same parameters, but without hooks."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, name, OrderedDict())
    return twin


def _own_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of each layer that the base does not have."""
    for name, module in network.named_modules():
        if f"{name}.".startswith(_OWN) and isinstance(module, nn.Conv2d):
            yield name, module


def _as_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the inputs of a layer to the dtype of its weight; the hook on it."""
    return tuple(cast_like(value, module.get_parameter("weight")) for value in args)


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the network from its tensors; whether they fit together is seen when it is built for a base."""
    return ControlLora(dict(tensors), dict(settings))


METHOD = Method(
    name="control-lora",
    summary="a ControlNet of the base's own encoder plus low-rank differences (Control-LoRA); needs the task `control`",
    attach=AttachedControlLora,
    layers="all",
    unsupported={
        "alpha": "its files have no scale",
        "text_encoder": "it is a network beside the denoiser",
        "sample_prompts": "samples have the prompts and condition pictures of training images",
    },
    needs_conditions=True,
    read_network=read_network,
)
