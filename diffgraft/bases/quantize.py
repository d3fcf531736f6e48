"""Quantizing the linear layers of a base to 8 or 4 bits per weight."""

from collections.abc import Callable

from torch import nn

from diffgraft.bases.base import Base
from diffgraft.bases.float8 import Float8
from diffgraft.bases.quantized import Quantize, Quantized
from diffgraft.progress import track
from diffgraft.third_party import import_bitsandbytes


def quantized(base: Base, to: Quantize) -> Base:
    """Quantize the linear layers of `base`, which must be on the CPU, in place, and return it; the VAE is left out."""
    if to == "none":
        return base
    kind = _kind(to)
    layers = [
        (owner, name)
        for part_name, part in base.parts()
        if part_name != "vae"
        for owner in part.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear  # subclasses may use their weight in other ways
    ]
    for owner, name in track(layers, f"rounding weights to {to}"):
        setattr(owner, name, kind(getattr(owner, name)))
    base.quantize = to
    return base


def _kind(to: Quantize) -> Callable[[nn.Linear], Quantized]:
    """Return the class of quantized layers that is called `to`."""
    if to == "fp8":
        return Float8
    import_bitsandbytes()  # takes seconds
    from diffgraft.bases.bnb_layers import KINDS

    return KINDS[to]
