"""Hypernetworks of stable-diffusion-webui: small networks on the context from which keys and values are computed.

In every attention, k = to_k(c + m · f_k(c)) and v = to_v(c + m · f_v(c)), with c the context, m the strength, and one
pair of networks f for each width of context (stable-diffusion-webui 1.10.1, ``modules/hypernetworks``).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from diffgraft.adapters.adapter import Adapter, Network
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Options, Spec, only_network
from diffgraft.adapters.patch import cast_like, to_cpu_float32
from diffgraft.adapters.shared import DeferredGradLinear
from diffgraft.bases.layers import parts_of
from diffgraft.bases.registry import denoisers, has_blocks
from diffgraft.errors import DiffgraftError, one_line

ACTIVATIONS: dict[str, type[nn.Module] | None] = {
    "linear": None,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}
"""Name in webui → module; webui's "swish" is Hardswish"""

_INITIALIZERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "Normal": lambda w, g: nn.init.normal_(w, 0, 0.01, generator=g),
    "XavierUniform": lambda w, g: nn.init.xavier_uniform_(w, generator=g),
    "XavierNormal": lambda w, g: nn.init.xavier_normal_(w, generator=g),
    "KaimingUniform": lambda w, g: nn.init.kaiming_uniform_(w, generator=g),
    "KaimingNormal": lambda w, g: nn.init.kaiming_normal_(w, generator=g),
}
"""Name in webui → function that initializes the weights of linear layers; their biases are zero"""

Keys = Literal["k", "v"]


class HypernetworkOptions(Options):
    """Options of hypernetworks: how the networks are built."""

    structure: list[float] = Field(default_factory=lambda: [1.0, 2.0, 1.0])
    """Widths of the layers, as multiples of the context's width; the first and the last must be 1"""
    activation: Literal[
        "linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "gelu", "softplus", "mish"
    ] = "linear"
    """Activation between the layers"""
    activate_output: bool = False
    """Whether the last layer is followed by the activation, too"""
    layer_norm: bool = False
    """Whether each layer is followed by layer normalisation"""
    dropout: list[float] = Field(default_factory=list)
    """Dropout probability after each layer, one number for each entry of `structure`; unset: no dropout"""
    start: Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"] = "Normal"
    """Initialization of the weights; `Normal`, with a standard deviation of 0.01, starts close to the base"""

    @model_validator(mode="after")
    def _check_dropout(self) -> Self:
        if self.dropout and (len(self.dropout) != len(self.structure) or not all(0 <= p < 1 for p in self.dropout)):
            raise ValueError(f"expected {len(self.structure)} probabilities, one per width, each from 0 to below 1")
        return self

    @field_validator("structure")
    @classmethod
    def _check_structure(cls, value: list[float]) -> list[float]:
        if (
            len(value) < 2
            or value[0] != 1
            or value[-1] != 1
            or min(value) <= 0
            or not max(value) <= 64
            or len(value) > 64
        ):
            raise ValueError("expected 2 to 64 numbers above 0 and up to 64, of which the first and the last are 1")
        return value


class ContextNetwork(nn.Module):
    """The network f: contexts [n, tokens, width] → [n, tokens, width], which are added to the contexts."""

    def __init__(self, width: int, options: HypernetworkOptions) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sides = [int(width * share) for share in options.structure]
        activation = ACTIVATIONS[options.activation]
        for place, (before, after) in enumerate(itertools.pairwise(sides)):
            layers.append(DeferredGradLinear(before, after))
            if activation is not None and (place < len(sides) - 2 or options.activate_output):
                layers.append(activation())
            if options.layer_norm:
                layers.append(nn.LayerNorm(after))
            if options.dropout and options.dropout[place + 1] > 0:
                layers.append(nn.Dropout(options.dropout[place + 1]))
        self.linear = nn.Sequential(*layers)

    def init_weights(self, options: HypernetworkOptions, generator: torch.Generator) -> None:
        """Initialize the weights as `options.start` says, and the biases with zero."""
        for layer in self.linear:
            if isinstance(layer, nn.Linear):
                _INITIALIZERS[options.start](layer.weight, generator)
                nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor) -> Tensor:
        out: Tensor = self.linear(cast_like(context, next(self.parameters())))
        return out

    def begin_pass(self) -> None:
        """Prepare for a forward pass in which the network is used several times; see `DeferredGradLinear`."""
        for layer in self.linear:
            if isinstance(layer, DeferredGradLinear):
                layer.begin_pass()

    @property
    def is_random(self) -> bool:
        """Whether dropout is active, so that two calls with the same context give different results."""
        return self.training and any(isinstance(layer, nn.Dropout) for layer in self.linear)

    def is_cheaper_fused(self, tokens: int) -> bool:
        """Whether the network is linear, and cheaper to use on `tokens` tokens after fusing its layers into one matrix.

        `tokens` counts the tokens of all attentions that use the network in a pass; the backward pass costs twice as
        much in both cases.
        """
        if not all(isinstance(layer, nn.Linear | nn.Dropout) for layer in self.linear) or self.is_random:
            return False
        layers = [layer for layer in self.linear if isinstance(layer, nn.Linear)]
        width = layers[0].in_features
        fusing = sum(layer.weight.numel() for layer in layers[1:]) * width
        return fusing + tokens * width**2 < tokens * sum(layer.weight.numel() for layer in layers)

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of a single linear layer that computes the same, for networks without activations."""
        layers = [layer for layer in self.linear if isinstance(layer, nn.Linear)]
        weight: Tensor = layers[0].weight
        bias: Tensor = layers[0].bias
        for layer in layers[1:]:
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
        return weight, bias


def context_projections(unet: nn.Module) -> dict[int, list[tuple[Keys, nn.Module]]]:
    """Width of context → the key and value projections with that input width, in all attentions of a UNet."""
    by_width: dict[int, list[tuple[Keys, nn.Module]]] = {}
    for module in unet.modules():
        to_k, to_v = getattr(module, "to_k", None), getattr(module, "to_v", None)
        if isinstance(to_k, nn.Linear) and isinstance(to_v, nn.Linear):
            by_width.setdefault(to_k.in_features, []).extend((("k", to_k), ("v", to_v)))
    return by_width


class HypernetworkHooks:
    """Context networks hooked before the key and value projections of a live UNet, until `remove`.

    What all attentions would compute in the same way is computed once, at the beginning of a pass through the UNet: the
    networks' outputs for the text, and the matrix 1 + strength · f for linear networks, and so are weight gradients.

    Args:
        unet: the network that is hooked.
        networks: ``<width>-k`` or ``<width>-v`` → network.
        strength: factor on the networks' outputs.
    """

    def __init__(self, unet: nn.Module, networks: Mapping[str, ContextNetwork], strength: float) -> None:
        self._networks, self._strength = networks, strength
        self.is_disabled = False
        self._widths = list(getattr(getattr(unet, "config", None), "block_out_channels", ()))
        self._uses: Counter[str] = Counter()
        # separate for passes with and without gradients: with gradient checkpointing, a pass without gradients can come
        # between a forward pass and its recomputation
        self._text_outputs: dict[bool, Any] = {True: WeakTensorKeyDictionary(), False: WeakTensorKeyDictionary()}
        self._matrices: dict[bool, dict[str, tuple[Tensor, Tensor]]] = {True: {}, False: {}}
        self._hooks = [unet.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for width, projections in context_projections(unet).items():
            for keys, projection in projections:
                if (name := f"{width}-{keys}") in networks:
                    self._uses[name] += 1
                    self._hooks.append(projection.register_forward_pre_hook(self._pre_hook(name)))

    def remove(self) -> None:
        """Remove all hooks; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_disabled:
            return
        sample = args[0] if args else kwargs.get("sample")
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        text_outputs: dict[str, Tensor] = {}
        matrices = self._matrices[torch.is_grad_enabled()] = {}
        for name, network in self._networks.items():
            network.begin_pass()
            width = int(name.partition("-")[0])
            if text is not None and text.shape[-1] == width and not network.is_random:
                text_outputs[name] = network(text)
            if sample is not None and width in self._widths:
                tokens = sample[:, 0].numel() // 4 ** self._widths.index(width)
                if network.is_cheaper_fused(tokens * self._uses[name]):
                    weight, bias = network.fused()
                    identity = torch.eye(width, dtype=weight.dtype, device=weight.device)
                    matrices[name] = (identity.add(weight, alpha=self._strength), self._strength * bias)
        if text_outputs:
            self._text_outputs[torch.is_grad_enabled()][text] = text_outputs

    def _change(self, name: str, context: Tensor) -> Tensor:
        """Compute c + strength · f(c) for the context c, from the results that `_begin` has prepared if possible."""
        graded = torch.is_grad_enabled()
        text_outputs = self._text_outputs[graded].get(context)
        if text_outputs is not None and name in text_outputs:
            change: Tensor = text_outputs[name]
        elif name in self._matrices[graded]:
            weight, bias = self._matrices[graded][name]
            return F.linear(cast_like(context, weight), weight, bias).to(context.dtype)
        else:
            change = self._networks[name](context)
        return context.add(change.to(context.dtype), alpha=self._strength)

    def _pre_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            context, *rest = args
            return args if self.is_disabled else (self._change(name, context), *rest)

        return hook


@dataclass(frozen=True, eq=False, repr=False)
class Hypernetwork(Network):
    """A trained set of context networks, in memory."""

    tensors: Mapping[str, Tensor]
    """``<width>-<k or v>.linear.<i>.weight`` and ``.bias``"""
    settings: Mapping[str, Any]
    """Values of `HypernetworkOptions`"""

    kind = "hypernetwork"

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        _, unet = _denoiser(parts)
        available = set(context_projections(unet))
        needed = {int(name.partition("-")[0]) for name in self.tensors}
        if not needed <= available:
            raise ValueError(
                f"it is for contexts of width {sorted(needed)}, but this base has {sorted(available)}: "
                "it was made for another family of bases"
            )
        device = next(unet.parameters()).device
        networks = {name: network.to(device) for name, network in self.build().items()}
        return HypernetworkHooks(unet, networks, strength).remove

    def build(self) -> dict[str, ContextNetwork]:
        """Build the networks, frozen, by name. Raises ValueError if tensors and settings do not fit together."""
        try:
            options = HypernetworkOptions.model_validate(dict(self.settings))
        except ValidationError as error:
            raise ValueError(f"its settings are invalid: {one_line(error)}") from error
        networks: dict[str, ContextNetwork] = {}
        for name in dict.fromkeys(key.partition(".")[0] for key in self.tensors):
            width = _width(name, self.tensors.get(f"{name}.linear.0.weight"))
            with torch.device("meta"):  # sizes from a file must not take memory before they are checked
                network = ContextNetwork(width, options)
            start = f"{name}."
            state = {key.removeprefix(start): v.float() for key, v in self.tensors.items() if key.startswith(start)}
            try:
                network.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ValueError(
                    f"the weights of {name} have other shapes than layer_structure={options.structure} requires"
                ) from error
            networks[name] = network.eval().requires_grad_(False)
        return networks


def _width(name: str, first: Tensor | None) -> int:
    """Context width in a network's name. Raises ValueError if the name, or the input of its first layer, differ."""
    width, _, side = name.partition("-")
    if not (width.isdecimal() and len(width) < 7 and side in ("k", "v")) or first is None or first.ndim != 2:
        raise ValueError(f"its network {name} has no first layer, or its name is not a width with k or v")
    if first.shape[1] != int(width):
        raise ValueError(f"its network {name} takes contexts of width {first.shape[1]}")
    return int(width)


def _denoiser(parts: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """Name and module of the denoiser among the networks of a base."""
    return next((name, parts[name]) for name in denoisers() if name in parts)


class AttachedHypernetwork(Attached):
    """Context networks on a live UNet, which are trained."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: HypernetworkOptions = spec.options
        generator = torch.Generator().manual_seed(spec.seed)
        self._part, unet = _denoiser(parts_of(target))
        if not has_blocks(self._part):
            raise DiffgraftError(
                "method=hypernetwork changes the context that cross-attentions read, but this base's denoiser has no "
                "such cross-attentions: choose method=lora."
            )
        networks: dict[str, ContextNetwork] = {}
        for width in sorted(context_projections(unet)):
            for keys in ("k", "v"):
                networks[f"{width}-{keys}"] = network = ContextNetwork(width, self._options)
                network.init_weights(self._options, generator)
        self.networks = nn.ModuleDict(networks).to(next(unet.parameters()).device)
        self._hooks = HypernetworkHooks(unet, networks, 1.0)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{self._part}.{name}": value for name, value in self.networks.named_parameters()}

    def paths(self) -> dict[str, str]:
        """Path of each parameter's network, which counts as one module, such as ``unet.320-k``."""
        return {name: ".".join(name.split(".")[:2]) for name in self.trainable()}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Start from the only hypernetwork of `adapter`, of the same structure; its dropout may differ."""
        source = only_network(adapter, Hypernetwork)
        for name, network in source.build().items():
            if name not in self.networks:
                raise ValueError(f"its network {name} is for a context width that this base does not have")
            live = self.networks[name]
            assert isinstance(live, ContextNetwork)
            if _structure(live) != _structure(network):
                raise ValueError(f"its networks have another structure: set {_as_options(source.settings)}")
            for parameter, value in zip(live.parameters(), network.parameters(), strict=True):
                parameter.copy_(value)
        return {f"unet.{name}" for name in source.build()}

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        network = Hypernetwork(to_cpu_float32(dict(self.networks.state_dict())), self._options.model_dump())
        return Adapter({}, metadata, (network,))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._hooks.is_disabled = True
        try:
            yield
        finally:
            self._hooks.is_disabled = False

    def detach(self) -> None:
        self._hooks.remove()


def _structure(network: ContextNetwork) -> list[str]:
    """Description of each layer with its sizes, without dropout."""
    return [str(layer) for layer in network.linear if not isinstance(layer, nn.Dropout)]


def _as_options(settings: Mapping[str, Any]) -> str:
    """Settings of a network in the form of command-line options."""
    options = HypernetworkOptions.model_validate(dict(settings))
    structure = ",".join(f"{share:g}" for share in options.structure)
    values = {"structure": structure, **options.model_dump(include={"activation", "activate_output", "layer_norm"})}
    return " ".join(f"options.{key}={str(value).lower()}" for key, value in values.items())


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """Build the network from tensors and settings, and check it. Raises ValueError if they do not fit together."""
    network = Hypernetwork(dict(tensors), dict(settings))
    network.build()
    return network


METHOD = Method(
    name="hypernetwork",
    summary="small networks on the inputs of keys and values; for styles; any strength",
    attach=AttachedHypernetwork,
    options=HypernetworkOptions,
    unsupported={
        **NO_FACTORS,
        "layers": "it adapts the keys and values of every attention of the UNet",
        "text_encoder": "it adapts the attentions of the UNet",
    },
    read_network=read_network,
)
