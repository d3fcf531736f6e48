"""Adapters on live layers, by forward hooks: a layer's module, parameter names and weights stay as they are.

Adapter layers of different methods can be stacked on the same layer; they run in the order in which they were attached,
and can be removed in any order. They work on frozen layers of any precision, quantised ones included; the weight itself
is available to methods only from the quantised layers of `diffgraft.bases.quantized`, and from no other kind.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from diffgraft.adapters.adapter import Adapter, Delta
from diffgraft.adapters.method import Attached, Spec, refuse, strip_text_model
from diffgraft.bases.layers import parts_of

Make = Callable[[str, nn.Module, torch.Generator], "AdapterLayer"]
"""Factory of adapter layers: (path of the layer with its part, layer, generator for initial values) → `AdapterLayer`"""


class AdapterLayer(nn.Module):
    """A method on one linear layer or convolution, with the parameters that are trained."""

    has_strength = True
    """Whether a strength s turns the output into out + s · (adapted − out), as merging does"""

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return the adapted output of `layer`, given its input `x` and its own output `out`."""

    @abstractmethod
    def delta(self) -> Delta:
        """Copy the current values into a `Delta`, in float32 on the CPU."""

    def load(self, delta: Delta, layer: nn.Module) -> None:  # noqa: ARG002  (subclasses use it)
        """Take the values of `delta`. Raises ValueError if its kind is another, or it does not fit the layer."""
        raise ValueError(f"is a {delta.kind}; this method does not support init_from")

    def lr_scales(self) -> dict[str, float]:
        """Learning-rate scale by parameter name; parameters that are not listed have a scale of 1."""
        return {}


class AttachedLayers(Attached):
    """Adapter layers on the layers that a `Spec` names."""

    def __init__(self, target: Any, spec: Spec, make: Make) -> None:
        super().__init__()
        parts = parts_of(target)
        generator = torch.Generator().manual_seed(spec.seed)
        self._adapter_layers = nn.ModuleList()
        self._layers: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        for part, paths in spec.paths.items():
            for path in paths:
                layer = parts[part].get_submodule(path)
                adapter_layer = make(f"{part}.{path}", layer, generator).to(_device(layer))
                self._adapter_layers.append(adapter_layer)
                self._layers[f"{part}.{path}"] = layer, layer.register_forward_hook(self._hook(adapter_layer))

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """Path of each adapted layer, with its part → its `AdapterLayer`."""
        return dict(zip(self._layers, self._adapter_layers, strict=True))  # type: ignore[arg-type]

    @property
    def has_strength(self) -> bool:
        return all(layer.has_strength for layer in self.adapter_layers().values())

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, _, value in self._parameters_with_paths()}

    def paths(self) -> dict[str, str]:
        return {name: strip_text_model(path) for name, path, _ in self._parameters_with_paths()}

    def _parameters_with_paths(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield the name of each parameter, the path of its layer, and the parameter."""
        for path, adapter_layer in self.adapter_layers().items():
            for name, value in adapter_layer.named_parameters():
                yield f"{path}.{name.replace('leaves.', '')}", path, value

    def lr_scales(self) -> dict[str, float]:
        return {
            f"{path}.{name}": scale
            for path, adapter_layer in self.adapter_layers().items()
            for name, scale in adapter_layer.lr_scales().items()
        }

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        deltas = {strip_text_model(path): (layer.delta(),) for path, layer in self.adapter_layers().items()}
        return Adapter(deltas, metadata)

    def load(self, adapter: Adapter) -> set[str]:
        refuse(adapter, "networks", "tokens")
        targets = {strip_text_model(path): (path, layer) for path, layer in self.adapter_layers().items()}
        if unknown := [path for path in adapter.deltas if path not in targets]:
            examples = f"{', '.join(unknown[:4])}{' …' if len(unknown) > 4 else ''}"
            raise ValueError(f"{len(unknown)} of its {len(adapter.deltas)} modules are not adapted here: {examples}")
        for path, deltas in adapter.deltas.items():
            full_path, adapter_layer = targets[path]
            if len(deltas) != 1:
                raise ValueError(f"{path} has {len(deltas)} deltas, and only one can be trained: combine them first")
            try:
                adapter_layer.load(deltas[0], self._layers[full_path][0])
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
        return set(adapter.deltas)

    def detach_modules(self, paths: Collection[str]) -> None:
        layers = self.adapter_layers()
        remaining = {path: layer for path, layer in layers.items() if strip_text_model(path) not in paths}
        for path in self._layers.keys() - remaining.keys():
            _, hook = self._layers.pop(path)
            hook.remove()
        self._adapter_layers = nn.ModuleList(remaining.values())

    def detach(self) -> None:
        for _, hook in self._layers.values():
            hook.remove()

    def _hook(self, adapter_layer: AdapterLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if self.is_disabled:
                return out
            adapted = adapter_layer.forward(layer, args[0], out)
            return adapted if self.strength == 1 else torch.lerp(out, adapted, self.strength)

        return hook


def _device(layer: nn.Module) -> torch.device:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.device


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, [out, in] or [out, in / groups, height, width]; works for quantised layers too."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features)


def run_layer(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run `layer` on `x` with `weight` in place of its own weight, and without a bias."""
    if isinstance(layer, nn.Conv2d):
        # with the layer's own stride, padding, padding mode, dilation and groups
        out: Tensor = layer._conv_forward(x, weight, None)
        return out
    return F.linear(x, weight)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """Cast `x` to the dtype of `like`; return it as is under autocast, which casts by itself."""
    return x if is_autocast(x.device) else x.to(like.dtype)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is enabled on this device; never on ``meta``, where nothing is computed."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def to_cpu_float32(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to float32 on the CPU."""
    return {name: value.detach().float().cpu().clone() for name, value in leaves.items()}
