"""Hypernetworks, as stable-diffusion-webui has them: small networks on the context of keys and values.

In every attention, k = to_k(c + m · f_k(c)) and v = to_v(c + m · f_v(c)), with c the context, m the strength, and one
pair of networks f for each width of context there is (stable-diffusion-webui 1.10.1, ``modules/hypernetworks``).
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
from diffgraft.adapters.method import NO_FACTORS, Attached, Method, Options, Spec, refuse
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
"""Name in the webui → module; its "swish" is Hardswish."""

_STARTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "Normal": lambda w, g: nn.init.normal_(w, 0, 0.01, generator=g),
    "XavierUniform": lambda w, g: nn.init.xavier_uniform_(w, generator=g),
    "XavierNormal": lambda w, g: nn.init.xavier_normal_(w, generator=g),
    "KaimingUniform": lambda w, g: nn.init.kaiming_uniform_(w, generator=g),
    "KaimingNormal": lambda w, g: nn.init.kaiming_normal_(w, generator=g),
}
"""Name in the webui → how the weights of the linear layers start; their biases are zero."""

Keys = Literal["k", "v"]


class HypernetworkOptions(Options):
    """How the networks are built."""

    structure: list[float] = Field(default_factory=lambda: [1.0, 2.0, 1.0])
    """Widths of the layers, as multiples of the context's; the first and the last are 1"""
    activation: Literal[
        "linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "gelu", "softplus", "mish"
    ] = "linear"
    """What stands between the layers"""
    activate_output: bool = False
    """Whether it stands behind the last one, too"""
    layer_norm: bool = False
    """Layer normalisation behind each layer"""
    dropout: list[float] = Field(default_factory=list)
    """Share dropped behind each layer in training, a number for each entry of `structure`; empty: nothing is dropped"""
    start: Literal["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"] = "Normal"
    """How the weights start; `Normal`, with a spread of 0.01, starts near the base"""

    @model_validator(mode="after")
    def _one_share_for_each(self) -> Self:
        if self.dropout and (len(self.dropout) != len(self.structure) or not all(0 <= p < 1 for p in self.dropout)):
            raise ValueError(f"dropout needs a share from 0 to below 1 for each of the {len(self.structure)} widths")
        return self

    @field_validator("structure")
    @classmethod
    def _whole(cls, value: list[float]) -> list[float]:
        if (
            len(value) < 2
            or value[0] != 1
            or value[-1] != 1
            or min(value) <= 0
            or not max(value) <= 64
            or len(value) > 64
        ):
            raise ValueError("it needs 2 to 64 numbers above 0 and up to 64, the first and the last of them 1")
        return value


class ContextNetwork(nn.Module):
    """f: contexts [n, tokens, width] → [n, tokens, width], to be added to them."""

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

    def start(self, options: HypernetworkOptions, generator: torch.Generator) -> None:
        """Fill in the initial weights."""
        for layer in self.linear:
            if isinstance(layer, nn.Linear):
                _STARTS[options.start](layer.weight, generator)
                nn.init.zeros_(layer.bias)

    def forward(self, context: Tensor) -> Tensor:
        found: Tensor = self.linear(cast_like(context, next(self.parameters())))
        return found

    def begin(self) -> None:
        """A pass begins, in which it will be asked several times."""
        for layer in self.linear:
            if isinstance(layer, DeferredGradLinear):
                layer.begin()

    @property
    def is_random(self) -> bool:
        """Whether it drops something, so that asking it twice gives two answers."""
        return self.training and any(isinstance(layer, nn.Dropout) for layer in self.linear)

    def shorter_for(self, tokens: int) -> bool:
        """Whether it is one matrix in disguise, and to work that out and use it on `tokens` is less than to use f.

        `tokens` are those of all the attentions that share it in a pass; the way back takes twice as much of either.
        """
        if not all(isinstance(layer, nn.Linear | nn.Dropout) for layer in self.linear) or self.is_random:
            return False
        layers = [layer for layer in self.linear if isinstance(layer, nn.Linear)]
        width = layers[0].in_features
        later = sum(layer.weight.numel() for layer in layers[1:]) * width
        return later + tokens * width**2 < tokens * sum(layer.weight.numel() for layer in layers)

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Matrix and bias of all layers in one, where nothing stands between them."""
        layers = [layer for layer in self.linear if isinstance(layer, nn.Linear)]
        weight: Tensor = layers[0].weight
        bias: Tensor = layers[0].bias
        for layer in layers[1:]:
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
        return weight, bias


def contexts(unet: nn.Module) -> dict[int, list[tuple[Keys, nn.Module]]]:
    """Width of a context → the projections to keys and values that take it, in all attentions of a UNet."""
    found: dict[int, list[tuple[Keys, nn.Module]]] = {}
    for module in unet.modules():
        to_k, to_v = getattr(module, "to_k", None), getattr(module, "to_v", None)
        if isinstance(to_k, nn.Linear) and isinstance(to_v, nn.Linear):
            found.setdefault(to_k.in_features, []).extend((("k", to_k), ("v", to_v)))
    return found


class Overlay:
    """Networks (``<width>-k`` and ``<width>-v`` → network) before the projections of a live UNet, until `remove`.

    What many attentions would work out alike is worked out once, when a pass through the UNet begins: what the
    networks make of the text, and 1 + strength · f where f is but one matrix; so are the gradients of their weights.
    """

    def __init__(self, unet: nn.Module, networks: Mapping[str, ContextNetwork], strength: float) -> None:
        self._networks, self._strength = networks, strength
        self.is_disabled = False
        self._widths = list(getattr(getattr(unet, "config", None), "block_out_channels", ()))
        self._uses: Counter[str] = Counter()
        # by whether gradients are made: a pass without them may come between one with them and its way back, when
        # checkpointing works out again what it did
        self._said: dict[bool, Any] = {True: WeakTensorKeyDictionary(), False: WeakTensorKeyDictionary()}
        self._matrices: dict[bool, dict[str, tuple[Tensor, Tensor]]] = {True: {}, False: {}}
        self._hooks = [unet.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for width, projections in contexts(unet).items():
            for keys, projection in projections:
                if (name := f"{width}-{keys}") in networks:
                    self._uses[name] += 1
                    self._hooks.append(projection.register_forward_pre_hook(self._before(name)))

    def remove(self) -> None:
        """Take them off; doing it twice is no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_disabled:
            return
        sample = args[0] if args else kwargs.get("sample")
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        said: dict[str, Tensor] = {}
        matrices = self._matrices[torch.is_grad_enabled()] = {}
        for name, network in self._networks.items():
            network.begin()
            width = int(name.partition("-")[0])
            if text is not None and text.shape[-1] == width and not network.is_random:
                said[name] = network(text)
            if sample is not None and width in self._widths:
                tokens = sample[:, 0].numel() // 4 ** self._widths.index(width)
                if network.shorter_for(tokens * self._uses[name]):
                    weight, bias = network.as_one()
                    itself = torch.eye(width, dtype=weight.dtype, device=weight.device)
                    matrices[name] = (itself.add(weight, alpha=self._strength), self._strength * bias)
        if said:
            self._said[torch.is_grad_enabled()][text] = said

    def _changed(self, name: str, context: Tensor) -> Tensor:
        """The context c under f: c + strength · f(c)."""
        graded = torch.is_grad_enabled()
        if (said := self._said[graded].get(context)) is not None and name in said:
            change: Tensor = said[name]
        elif name in self._matrices[graded]:
            weight, bias = self._matrices[graded][name]
            return F.linear(cast_like(context, weight), weight, bias).to(context.dtype)
        else:
            change = self._networks[name](context)
        return context.add(change.to(context.dtype), alpha=self._strength)

    def _before(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            context, *rest = args
            return args if self.is_disabled else (self._changed(name, context), *rest)

        return hook


@dataclass(frozen=True, eq=False, repr=False)
class Hypernetwork(Network):
    """A trained set of context networks."""

    tensors: Mapping[str, Tensor]
    """``<width>-<k or v>.linear.<i>.weight`` and ``.bias``"""
    settings: Mapping[str, Any]
    """The fields of `HypernetworkOptions`"""

    kind = "hypernetwork"

    def hook(self, parts: Mapping[str, nn.Module], strength: float) -> Callable[[], None]:
        _, unet = _denoiser(parts)
        here, wanted = set(contexts(unet)), {int(name.partition("-")[0]) for name in self.tensors}
        if not wanted <= here:
            raise ValueError(
                f"it is for contexts as wide as {sorted(wanted)}, and this base has {sorted(here)}: "
                "it was made for another family of bases"
            )
        device = next(unet.parameters()).device
        networks = {name: network.to(device) for name, network in self.build().items()}
        return Overlay(unet, networks, strength).remove

    def build(self) -> dict[str, ContextNetwork]:
        """The networks by name, frozen. Raises ValueError where tensors and settings do not fit together."""
        try:
            options = HypernetworkOptions.model_validate(dict(self.settings))
        except ValidationError as error:
            raise ValueError(f"its settings are not those of a hypernetwork: {one_line(error)}") from error
        networks: dict[str, ContextNetwork] = {}
        for name in dict.fromkeys(key.partition(".")[0] for key in self.tensors):
            width = _width(name, self.tensors.get(f"{name}.linear.0.weight"))
            with torch.device("meta"):  # shapes alone: what a file claims takes no memory before it is checked
                network = ContextNetwork(width, options)
            start = f"{name}."
            state = {key.removeprefix(start): v.float() for key, v in self.tensors.items() if key.startswith(start)}
            try:
                network.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ValueError(f"the weights of {name} do not fit a structure of {options.structure}") from error
            networks[name] = network.eval().requires_grad_(False)
        return networks


def _width(name: str, first: Tensor | None) -> int:
    """The width of contexts that a network's name tells, if its first layer has it too. Raises ValueError if not."""
    width, _, side = name.partition("-")
    if not (width.isdecimal() and len(width) < 7 and side in ("k", "v")) or first is None or first.ndim != 2:
        raise ValueError(f"its network {name} has no first layer, or is not called by its width and k or v")
    if first.shape[1] != int(width):
        raise ValueError(f"its network {name} takes contexts as wide as {first.shape[1]}")
    return int(width)


def _denoiser(parts: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """Name and module of the denoiser among the networks of a base."""
    return next((name, parts[name]) for name in denoisers() if name in parts)


class AttachedHypernetwork(Attached):
    """Context networks on a live UNet."""

    def __init__(self, target: Any, spec: Spec) -> None:
        super().__init__()
        self._options: HypernetworkOptions = spec.options
        generator = torch.Generator().manual_seed(spec.seed)
        self._part, unet = _denoiser(parts_of(target))
        if not has_blocks(self._part):
            raise DiffgraftError(
                "method=hypernetwork changes what cross-attention reads of a prompt, and this base's denoiser has no "
                "cross-attention of that kind: take method=lora."
            )
        networks: dict[str, ContextNetwork] = {}
        for width in sorted(contexts(unet)):
            for keys in ("k", "v"):
                networks[f"{width}-{keys}"] = network = ContextNetwork(width, self._options)
                network.start(self._options, generator)
        self.networks = nn.ModuleDict(networks).to(next(unet.parameters()).device)
        self._overlay = Overlay(unet, networks, 1.0)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{self._part}.{name}": value for name, value in self.networks.named_parameters()}

    def paths(self) -> dict[str, str]:
        """Each of the networks is one module: ``unet.320-k``."""
        return {name: ".".join(name.split(".")[:2]) for name in self.trainable()}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> set[str]:
        """Its one hypernetwork, of the same structure; what is dropped in training may be another share."""
        refuse(adapter, "deltas", "tokens")
        held = adapter.networks[0] if len(adapter.networks) == 1 else None
        if not isinstance(held, Hypernetwork):
            raise ValueError(f"it holds {len(adapter.networks)} networks, and one hypernetwork can train")
        for name, network in held.build().items():
            if name not in self.networks:
                raise ValueError(f"its network {name} is for a width of contexts that this base does not have")
            ours = self.networks[name]
            assert isinstance(ours, ContextNetwork)
            if _built(ours) != _built(network):
                raise ValueError(f"its networks are built otherwise: set {_as_options(held.settings)}")
            for own, theirs in zip(ours.parameters(), network.parameters(), strict=True):
                own.copy_(theirs)
        return {f"unet.{name}" for name in held.build()}

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        network = Hypernetwork(to_cpu_float32(dict(self.networks.state_dict())), self._options.model_dump())
        return Adapter({}, metadata, (network,))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._overlay.is_disabled = True
        try:
            yield
        finally:
            self._overlay.is_disabled = False

    def detach(self) -> None:
        self._overlay.remove()


def _built(network: ContextNetwork) -> list[str]:
    """The layers it is made of, with their sizes, but for those that drop something."""
    return [str(layer) for layer in network.linear if not isinstance(layer, nn.Dropout)]


def _as_options(settings: Mapping[str, Any]) -> str:
    """Settings of a network as a command line would give them."""
    given = HypernetworkOptions.model_validate(dict(settings))
    structure = ",".join(f"{share:g}" for share in given.structure)
    said = {"structure": structure, **given.model_dump(include={"activation", "activate_output", "layer_norm"})}
    return " ".join(f"options.{key}={str(value).lower()}" for key, value in said.items())


def read_network(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Network:
    """From tensors and settings, tried once."""
    network = Hypernetwork(dict(tensors), dict(settings))
    network.build()
    return network


METHOD = Method(
    name="hypernetwork",
    summary="small networks on what keys and values are made from; styles; strength at will",
    attach=AttachedHypernetwork,
    options=HypernetworkOptions,
    unsupported={
        **NO_FACTORS,
        "layers": "its networks lie before the keys and values of every attention of the UNet",
        "text_encoder": "its networks lie in the UNet's attentions",
    },
    read_network=read_network,
)
