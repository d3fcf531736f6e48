"""LoRAs beside the layers of a processor: their thin products are added to the outputs, and no weight is written.

On Stable Diffusion 1.5 this takes up to 5 % of a step (`benchmarks.session`), and the strength can change at once,
while merging reads and writes most of the model. On GPUs, and for small layers, merging is the faster way.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from diffgraft.adapters.adapter import Delta
from diffgraft.adapters.factors import FactorDelta

_LEAST = 2**16
"""Number of values of a weight from which a LoRA lies beside it"""


def thin_factors(layer: nn.Module, deltas: Sequence[tuple[Delta, float]]) -> tuple[Tensor, Tensor] | None:
    """Return `up` [out, r] and `down` [r, in · height · width] of the sum of all changes.

    Returns None where the deltas are to be merged into the weight instead: one of them is no LoRA, the layer is small
    or on a GPU, or it is neither linear nor a plain convolution.
    """
    weight = getattr(layer, "weight", None)
    is_conv = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and layer.groups == 1
    if not isinstance(weight, Tensor) or not (is_conv or type(layer) is nn.Linear):
        return None
    if weight.device.type != "cpu" or weight.numel() < _LEAST or not weight.is_floating_point():
        return None
    pairs = []
    for delta, strength in deltas:
        pair = delta.low_rank_factors(strength) if isinstance(delta, FactorDelta) and delta.is_lora else None
        if pair is None or not all(bool(factor.isfinite().all()) for factor in pair):
            return None
        pairs.append(pair)
    up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
    return up.to(weight.dtype), down.to(weight.dtype)


_LAID: WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""Layer → factors of the changes that lie beside it"""


def whole_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight with the changes that lie beside it, in float32."""
    weight = layer.get_parameter("weight").detach().float()
    for up, down in _LAID.get(layer, ()):
        weight = torch.addmm(weight.flatten(1), up.float(), down.float()).view_as(weight)
    return weight


def lay_beside(layer: nn.Module, up: Tensor, down: Tensor) -> Callable[[], None]:
    """Hook a low-rank change to a layer, and return a function that removes it."""

    def after(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        (x, *_) = args
        own_up, own_down = up.to(x), down.to(x)
        if isinstance(layer, nn.Conv2d):
            kernel = own_down.view(-1, x.shape[1], *layer.kernel_size)
            small = conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation).flatten(2)
            flat, wide = out.flatten(2), own_up.expand(len(out), *own_up.shape)
            added = torch.baddbmm(flat, wide, small) if torch.is_grad_enabled() else flat.baddbmm_(wide, small)
        else:
            small, flat = x.reshape(-1, x.shape[-1]) @ own_down.mT, out.reshape(-1, out.shape[-1])
            added = torch.addmm(flat, small, own_up.mT) if torch.is_grad_enabled() else flat.addmm_(small, own_up.mT)
        return added.view_as(out)  # in place where nobody needs the output that the layer has just made

    hook, pair = layer.register_forward_hook(after), (up, down)
    _LAID.setdefault(layer, []).append(pair)

    def remove() -> None:
        hook.remove()
        _LAID[layer] = [other for other in _LAID[layer] if other is not pair]

    return remove
