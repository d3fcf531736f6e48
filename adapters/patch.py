"""A method on live layers: what a layer gives is changed by a hook, so its module, names and weights stay as they are.

Patches of any methods lie over one another on the same layer, in the order in which they were attached; each is taken
off by itself. They work beside frozen layers of any precision, quantised ones included; a method that asks for the
weight can have it from the layers of `diffgraft.bases.quantized`, and from no other quantised ones.
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
"""Path of a layer (with its part), the layer, a generator for initial values → the patch for it."""


class AdapterLayer(nn.Module):
    """One method on one linear layer or convolution; its parameters are the ones that train."""

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """What the layer gives under this patch, where it got `x` and gave `out`."""

    @abstractmethod
    def delta(self) -> Delta:
        """A copy of what it is now, in float32 on the CPU."""

    def load(self, delta: Delta, layer: nn.Module) -> None:  # noqa: ARG002  (others need it)
        """Become what `delta` is. Raises ValueError where it is of another kind, or does not fit the layer."""
        raise ValueError(f"is a {delta.kind}, and this method cannot start from a file")

    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by the name of the parameter."""
        return {}


class AttachedLayers(Attached):
    """Patches on the layers that a `Spec` names."""

    def __init__(self, target: Any, spec: Spec, make: Make) -> None:
        super().__init__()
        parts = parts_of(target)
        generator = torch.Generator().manual_seed(spec.seed)
        self._patches = nn.ModuleList()
        self._layers: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        for part, paths in spec.paths.items():
            for path in paths:
                layer = parts[part].get_submodule(path)
                patch = make(f"{part}.{path}", layer, generator).to(_device(layer))
                self._patches.append(patch)
                self._layers[f"{part}.{path}"] = layer, layer.register_forward_hook(self._hook(patch))

    def patches(self) -> dict[str, AdapterLayer]:
        """Path → patch."""
        return dict(zip(self._layers, self._patches, strict=True))  # type: ignore[arg-type]

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, _, value in self._named()}

    def paths(self) -> dict[str, str]:
        return {name: strip_text_model(path) for name, path, _ in self._named()}

    def _named(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Name of each parameter, path of its layer, and the parameter."""
        for path, patch in self.patches().items():
            for name, value in patch.named_parameters():
                yield f"{path}.{name.replace('leaves.', '')}", path, value

    def rates(self) -> dict[str, float]:
        return {
            f"{path}.{name}": rate for path, patch in self.patches().items() for name, rate in patch.rates().items()
        }

    def adapter(self, metadata: Mapping[str, Any]) -> Adapter:
        return Adapter({strip_text_model(path): (patch.delta(),) for path, patch in self.patches().items()}, metadata)

    def load(self, adapter: Adapter) -> set[str]:
        refuse(adapter, "networks", "tokens")
        patches = {strip_text_model(path): (path, patch) for path, patch in self.patches().items()}
        if strange := [path for path in adapter.deltas if path not in patches]:
            few = f"{', '.join(strange[:4])}{' …' if len(strange) > 4 else ''}"
            raise ValueError(f"{len(strange)} of its {len(adapter.deltas)} modules are not adapted here: {few}")
        for path, deltas in adapter.deltas.items():
            full, patch = patches[path]
            if len(deltas) != 1:
                raise ValueError(f"{path} has {len(deltas)} deltas, of which one can train")
            try:
                patch.load(deltas[0], self._layers[full][0])
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
        return set(adapter.deltas)

    def detach_modules(self, paths: Collection[str]) -> None:
        kept = {path: patch for path, patch in self.patches().items() if strip_text_model(path) not in paths}
        for path in self._layers.keys() - kept.keys():
            _, hook = self._layers.pop(path)
            hook.remove()
        self._patches = nn.ModuleList(kept.values())

    def detach(self) -> None:
        for _, hook in self._layers.values():
            hook.remove()

    def _hook(self, patch: AdapterLayer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def change(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out if self.is_disabled else patch.forward(layer, args[0], out)

        return change


def _device(layer: nn.Module) -> torch.device:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.device


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight: [out, in], or [out, in / groups, height, width]; of a quantised layer, too."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features)


def run_layer(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give for `x` with `weight` in the place of its own, and without a bias."""
    if isinstance(layer, nn.Conv2d):
        # its stride, padding and mode of padding, dilation and groups
        out: Tensor = layer._conv_forward(x, weight, None)
        return out
    return F.linear(x, weight)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the precision of `like`; under autocast, which sees to that itself, as it is."""
    return x if is_autocast(x.device) else x.to(like.dtype)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast sees to precisions on this device; on ``meta``, where nothing is computed, there is none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def to_cpu_float32(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float32 on the CPU."""
    return {name: value.detach().float().cpu().clone() for name, value in leaves.items()}
