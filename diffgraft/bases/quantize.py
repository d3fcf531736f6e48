"""A base whose linear layers are rounded to 8 or 4 bits a weight, in place."""

from torch import nn

from diffgraft.bases.base import Base
from diffgraft.bases.quantized import Quantize
from diffgraft.progress import track
from diffgraft.third_party import import_bitsandbytes


def quantized(base: Base, to: Quantize) -> Base:
    """`base`, which lies in the processor's memory, with its linear layers changed in place."""
    if to == "none":
        return base
    import_bitsandbytes()  # takes seconds
    from diffgraft.bases.bnb_layers import KINDS

    places = [
        (owner, name)
        for part_name, part in base.parts()
        if part_name != "vae"
        for owner in part.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear  # what is more than that may have its weight used in other ways
    ]
    for owner, name in track(places, f"rounding weights to {to}"):
        setattr(owner, name, KINDS[to](getattr(owner, name)))
    base.quantize = to
    return base
