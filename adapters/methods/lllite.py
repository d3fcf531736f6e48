"""ControlNet-LLLite: small networks at the inputs of attentions that steer the denoiser by condition pictures.

By kohya-ss, for Stable Diffusion XL (sd-scripts, ``networks/control_net_lllite.py``; there is no paper). With x [n,
tokens, width] the input of a layer, c the condition picture and ‖ concatenation of widths:

    x  →  x + strength · up(ReLU(mid(conditioning1(c) ‖ ReLU(down(x)))))

conditioning1 shrinks the picture by convolutions without overlap until each token has one vector. `up` begins at zero,
here also its bias, so that training begins at the base.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.control import PART, ConditionedNetwork
from diffgraft.adapters.method import Attached, Method, Options, Spec, only_network
from diffgraft.adapters.patch import cast_like, to_cpu_float32
from diffgraft.bases import Base
from diffgraft.bases.control import InputControl
from diffgraft.bases.loading import base_of
from diffgraft.errors import DiffgraftError, one_line

_FIRST = 4
"""Kernel of the first convolution"""
_KEY = re.compile(r"(?P<path>.+)\.(?P<leaf>(?:conditioning1\.\d+|down\.0|mid\.0|up\.0)\.(?:weight|bias))")
_MAX_CONVOLUTIONS = 8
"""Number of convolutions of a layer at most; files have two or three"""
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class LiteSize:
    """Sizes of the LLLite network at one layer."""

    width: int
    """Width of the layer's input"""
    kernels: tuple[int, ...]
    """Kernels of the convolutions on the picture, which are also their strides; their product is the side of a token
    in pixels"""
    cond_emb_dim: int
    """Width of the vectors of the picture"""
    mlp_dim: int
    """Width in the middle"""

    @classmethod
    def of(cls, leaves: Mapping[str, Tensor]) -> "LiteSize":
        """Return the sizes of a network with these leaves. Raises ValueError if they are not those of a network."""
        count = sum(name.startswith("conditioning1.") and name.endswith(".weight") for name in leaves)
        names = [f"conditioning1.{2 * number}.weight" for number in range(count)]
        try:
            if not 2 <= count <= _MAX_CONVOLUTIONS or leaves["down.0.weight"].ndim != 2:
                raise ValueError("it has no linear layers, or another number of convolutions")
            kernels = tuple(leaves[name].shape[3] for name in names)
            mlp_dim, width = leaves["down.0.weight"].shape
            return cls(width, kernels, leaves[names[-1]].shape[0], mlp_dim)
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        except IndexError as error:
            raise ValueError("a weight of its convolutions has too few axes") from error


def kernels_for(pixels: int) -> tuple[int, ...]:
    """Return the kernels of the convolutions for tokens of `pixels` × `pixels`, a multiple of 4.

    For 8, 16 and 32 pixels they are those of sd-scripts, which has no others.

    Raises:
        ValueError: `pixels` is no power of two from 4 on.
    """
    if pixels < _FIRST or pixels & (pixels - 1):
        raise ValueError(f"its tokens have a side of {pixels} pixels, but powers of two from {_FIRST} on are needed")
    kernels, rest = [_FIRST], pixels // _FIRST
    while rest > 1 or len(kernels) == 1:
        kernels.append(min(rest, 4))
        rest //= kernels[-1]
    return tuple(kernels)


class LiteLayer(nn.Module):
    """The network at one layer; its submodules have the names of sd-scripts."""

    def __init__(self, size: LiteSize) -> None:
        super().__init__()
        half, widths = size.cond_emb_dim // 2, [3]
        widths += [half] * (len(size.kernels) - 1) + [size.cond_emb_dim]
        steps: list[nn.Module] = []
        for number, kernel in enumerate(size.kernels):
            steps += [nn.ReLU()] if number else []
            steps.append(nn.Conv2d(widths[number], widths[number + 1], kernel, stride=kernel))
        self.conditioning1 = nn.Sequential(*steps)
        self.down = nn.Sequential(nn.Linear(size.width, size.mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(size.mlp_dim + size.cond_emb_dim, size.mlp_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(size.mlp_dim, size.width))
        self._pixels = math.prod(size.kernels)

    def forward(self, x: Tensor, pictures: Tensor) -> Tensor:
        """Return what is added to the input x [n, tokens, width], for n pictures [n, 3, height, width], from −1 to 1.

        Where the sides are no multiples of the token's, the last tokens see pixels of the border repeated.
        """
        beyond = [-side % self._pixels for side in pictures.shape[-2:]]
        if any(beyond):
            pictures = F.pad(pictures, (0, beyond[1], 0, beyond[0]), mode="replicate")
        weight: Any = self.down[0].weight
        seen = self.conditioning1(cast_like(pictures, weight)).flatten(2).transpose(1, 2)
        out: Tensor = self.up(self.mid(torch.cat([seen, self.down(cast_like(x, weight))], 2)))
        return out


Signal = tuple[Tensor, float]
"""Condition pictures [n, 3, height, width] with values from −1 to 1, and strength"""


class LiteNetwork(InputControl):
    """The networks at all layers, with forward hooks on these layers that do nothing outside of `acting`."""

    def __init__(self, layers: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        """Take the path of each layer inside the denoiser → the layer, and the network at its input."""
        super().__init__()
        self.networks = nn.ModuleList(network for _, network in layers.values())
        self.layers = {path: layer for path, (layer, _) in layers.items()}
        """Path → layer of the denoiser, which is no submodule of this network"""
        self.signal: Signal | None = None
        """What acts now; None outside of `acting`"""
        self._hooks: list[RemovableHandle] = []

    def named_networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the path of each layer, and the network at its input."""
        yield from zip(self.layers, self.networks, strict=True)

    def hook(self) -> None:
        """Register forward hooks on all layers; `unhook` removes them."""
        self._hooks = [
            self.layers[path].register_forward_pre_hook(partial(self._steer, network))
            for path, network in self.named_networks()
        ]

    def unhook(self) -> None:
        """Remove the forward hooks that `hook` registered."""
        while self._hooks:
            self._hooks.pop().remove()

    def acting(self, pictures: Tensor, strength: float) -> AbstractContextManager[None]:
        return self.acting_by((2 * pictures - 1, strength))

    @contextmanager
    def acting_by(self, signal: Signal | None) -> Iterator[None]:
        """Act by a signal within the block; without hooks of `hook` they are there within the block alone."""
        before, is_temporary = self.signal, not self._hooks
        if is_temporary:
            self.hook()
        self.signal = signal
        try:
            yield
        finally:
            self.signal = before
            if is_temporary:
                self.unhook()

    def _steer(self, network: nn.Module, _layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add to the input of a layer; the hook on it."""
        if self.signal is None:
            return None
        pictures, strength = self.signal
        x, *others = args
        return (x + (strength * network(x, pictures)).to(x.dtype), *others)


@dataclass(frozen=True, eq=False, repr=False)
class LiteControl(ConditionedNetwork):
    """A trained ControlNet-LLLite, in memory."""

    tensors: Mapping[str, Tensor]
    """Weights: path of the layer inside the denoiser, and name in `LiteLayer`"""
    settings: Mapping[str, Any]
    """Empty: the sizes are those of the tensors"""

    kind = "lllite"

    def build(self, base: Base) -> "LiteNetwork":
        known = {layer.path: layer.pixels for layer in base.family.picture_layers(base)}
        layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        for path, leaves in self._by_path().items():
            if path not in known:
                raise ValueError(f"it steers the layer {path}, which this base does not have")
            layer: Any = base.denoiser.get_submodule(path)
            try:
                layers[path] = layer, _built(leaves, layer.in_features, known[path])
            except ValueError as error:
                raise ValueError(f"at {path}, {error}") from error
        return LiteNetwork(layers).requires_grad_(False).eval()

    def _by_path(self) -> dict[str, Leaves]:
        """Return the path of each layer → its weights. Raises ValueError for another name of a weight."""
        layers: dict[str, Leaves] = {}
        for name, value in self.tensors.items():
            found = _KEY.fullmatch(name)
            if found is None:
                raise ValueError(f"{name} is no weight of a ControlNet-LLLite")
            layers.setdefault(found["path"], {})[found["leaf"]] = value
        return layers


def _built(leaves: Leaves, width: int, pixels: int) -> LiteLayer:
    """Build the network at a layer of this width, with tokens of this side in pixels.

    Raises:
        ValueError: it is for another width or side, or its weights do not fit together.
    """
    size = LiteSize.of(leaves)
    if size.width != width:
        raise ValueError(f"it is for inputs of width {size.width}, and this base has {width}")
    if math.prod(size.kernels) != pixels:
        raise ValueError(f"it shrinks pictures by {math.prod(size.kernels)}, and this base by {pixels}")
    try:
        with torch.device("meta"):
            network = LiteLayer(size)
        network.load_state_dict({name: value.float() for name, value in leaves.items()}, assign=True)
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"its weights do not fit together: {one_line(error, 300)}") from error
    return network


class AttachedLite(Attached):
    """A ControlNet-LLLite attached to a denoiser for training."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._base = base = target if isinstance(target, Base) else base_of(target)
        usual = [layer for layer in base.family.picture_layers(base) if layer.is_usual]
        if not usual:
            raise DiffgraftError(f"Bases of the family {base.family.name} have no control networks of this kind.")
        options: LiteOptions = spec.options
        layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        with torch.random.fork_rng(devices=[]), torch.device("meta" if base.device.type == "meta" else "cpu"):
            torch.manual_seed(spec.seed)
            for own in usual:
                layer: Any = base.denoiser.get_submodule(own.path)
                size = LiteSize(layer.in_features, kernels_for(own.pixels), options.cond_emb_dim, options.mlp_dim)
                layers[own.path] = layer, _beginning(size)
        self.network = self._live(LiteNetwork(layers))

    def _live(self, network: LiteNetwork) -> LiteNetwork:
        """Return a network on the base's device, with hooks, to be trained."""
        network.hook()
        return network.to(self._base.device).requires_grad_(True).train()

    @property
    def control(self) -> LiteNetwork:
        return self.network

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            f"{PART}.{path}.{name}": value
            for path, network in self.network.named_networks()
            for name, value in network.named_parameters()
        }

    def paths(self) -> dict[str, str]:
        start = self._base.family.denoiser
        return {
            f"{PART}.{path}.{name}": f"{start}.{path}"
            for path, network in self.network.named_networks()
            for name, _ in network.named_parameters()
        }

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        tensors = {name.removeprefix(f"{PART}."): value for name, value in self.trainable().items()}
        return Adapter({}, metadata, (LiteControl(to_cpu_float32(tensors), {}),))

    def as_now(self) -> AbstractContextManager[None]:
        return self._both(super().as_now(), self.network.acting_by(self.network.signal))

    @staticmethod
    @contextmanager
    def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
        with first, second:
            yield

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only network of `adapter`, with its layers and sizes."""
        built = only_network(adapter, LiteControl).build(self._base)
        self.network.unhook()
        self.network = self._live(built)
        return set(self.paths().values())

    def detach_modules(self, paths: Collection[str]) -> None:
        start = self._base.family.denoiser
        kept = {
            path: (self.network.layers[path], network)
            for path, network in self.network.named_networks()
            if f"{start}.{path}" not in paths
        }
        self.network.unhook()
        self.network = self._live(LiteNetwork(kept))

    def detach(self) -> None:
        self.network.unhook()


def _beginning(size: LiteSize) -> LiteLayer:
    """Return a new network that does nothing yet, with random values as PyTorch's layers begin with."""
    network = LiteLayer(size)
    for value in network.up.parameters():
        nn.init.zeros_(value)
    return network


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the network from its tensors; whether they fit together is seen when it is built for a base."""
    return LiteControl(dict(tensors), dict(settings))


class LiteOptions(Options):
    """Options of ControlNet-LLLite."""

    cond_emb_dim: int = Field(32, ge=2, le=1024, multiple_of=2)
    """Width of the vectors that condition pictures become"""
    mlp_dim: int = Field(64, ge=1, le=4096)
    """Width of the small network at each layer"""


METHOD = Method(
    name="lllite",
    summary="small networks at the attentions that steer by condition pictures (ControlNet-LLLite); needs `control`",
    attach=AttachedLite,
    options=LiteOptions,
    unsupported={
        **dict.fromkeys(("rank", "alpha"), "its sizes are options.mlp_dim and options.cond_emb_dim"),
        "layers": "it goes on the attentions of the encoder and the middle, as other programs expect",
        "text_encoder": "it steers the denoiser",
        "sample_prompts": "samples have the prompts and condition pictures of training images",
    },
    needs_conditions=True,
    read_network=read_network,
)
